import pytest
import torch

from lme_kernels.functional import softmax


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_softmax_is_torchs_of_scaled_and_bounded_scores(softcap):
    x = (torch.randn(4, 33, dtype=torch.float64) * 10).requires_grad_()
    scores = 0.3 * x if softcap is None else softcap * torch.tanh(0.3 * x / softcap)
    ours, theirs = softmax(x, scale=0.3, softcap=softcap), torch.softmax(scores, -1)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    grad = torch.randn_like(x)
    mine, other = (torch.autograd.grad(y, x, grad)[0] for y in (ours, theirs))
    torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


def test_hidden_classes_get_nothing_and_large_scores_do_not_overflow():
    y = softmax(torch.tensor([[1e30, float("-inf"), 1e30]]))
    assert torch.equal(y, torch.tensor([[0.5, 0.0, 0.5]]))


def test_a_bound_that_bounds_nothing_is_refused():
    with pytest.raises(ValueError, match="`softcap` must be above 0"):
        softmax(torch.randn(2, 3), softcap=0.0)
