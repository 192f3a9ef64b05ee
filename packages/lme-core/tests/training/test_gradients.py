import pytest
import torch

from lme_core.training.gradients import clip, global_norm


def test_the_norm_is_right_to_the_last_digits_over_millions_of_elements():
    # A plain fp32 norm of this is wrong by 1e-4.
    big = torch.randn(3_000_001)
    small = torch.randn(7, 3)
    expected = torch.cat([big, small.flatten()]).double().norm().item()
    assert global_norm([big, small]).item() == pytest.approx(expected, rel=2e-7)


def test_the_norm_depends_little_on_how_tensors_are_cut():
    whole = torch.randn(100_003)
    parts = whole.split(9_999)
    assert global_norm(parts).item() == pytest.approx(global_norm([whole]).item(), rel=1.2e-7)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_norm_is_taken_in_at_least_fp32(dtype):
    tensors = [torch.randn(5, 9, dtype=dtype), torch.randn((), dtype=dtype), torch.zeros(0)]
    expected = torch.cat([t.double().flatten() for t in tensors]).norm()
    norm = global_norm(tensors)
    eps = torch.finfo(norm.dtype).eps
    assert norm.dtype == torch.promote_types(dtype, torch.float32)
    assert norm.item() == pytest.approx(expected.item(), rel=4 * eps)


def test_what_is_not_finite_shows():
    assert not torch.isfinite(global_norm([torch.ones(3), torch.tensor([1.0, float("nan")])]))
    assert not torch.isfinite(global_norm([torch.tensor([float("inf")])]))


def test_nothing_has_norm_zero():
    assert global_norm([]).item() == 0


def test_clip_scales_in_place():
    tensors = [torch.tensor([2.0, 4.0]), torch.tensor(6.0)]
    clip(tensors, torch.tensor(0.5))
    assert [t.tolist() for t in tensors] == [[1.0, 2.0], 3.0]
