import pytest
import torch
from torch.nn import functional as F

from lme_kernels.functional import qk_norm_rope, rope


def angles(*shape):
    half = torch.rand(*shape[:-1], shape[-1] // 2, dtype=torch.float64) * 6
    return half, torch.cat((half.cos(), half.cos()), -1), torch.cat((half.sin(), half.sin()), -1)


def turn(x, half, channels):
    """Rotate pairs of channels as complex numbers, one head at a time."""
    R = 2 * half.shape[-1]
    start = x.shape[-1] - R if channels == "last" else 0
    pair = torch.complex(x[..., start : start + R // 2], x[..., start + R // 2 : start + R])
    half = half if half.ndim == 3 else half.expand(x.shape[0], *half.shape)
    turned = pair * torch.polar(torch.ones_like(half), half).unsqueeze(2)
    y = x.clone()
    y[..., start : start + R] = torch.cat((turned.real, turned.imag), -1)
    return y


@pytest.mark.parametrize("channels", ["last", "first"])
@pytest.mark.parametrize("shape", [(5, 8), (5, 4), (2, 5, 6)], ids=str)
def test_pairs_turn_like_complex_numbers(channels, shape):
    query = torch.randn(2, 5, 4, 8, dtype=torch.float64, requires_grad=True)
    key = torch.randn(2, 5, 2, 8, dtype=torch.float64, requires_grad=True)
    half, cos, sin = angles(*shape)
    ours = rope(query, key, cos, sin, channels=channels)
    theirs = turn(query, half, channels), turn(key, half, channels)
    for y, other, x in zip(ours, theirs, (query, key), strict=True):
        torch.testing.assert_close(y, other, rtol=1e-12, atol=1e-12)
        grad = torch.randn_like(y)
        mine, others = (torch.autograd.grad(each, x, grad)[0] for each in (y, other))
        torch.testing.assert_close(mine, others, rtol=1e-12, atol=1e-12)


def test_products_depend_on_the_distance_only():
    positions = torch.arange(12, dtype=torch.float64)
    half = positions[:, None] * torch.tensor([1.0, 0.1, 0.01, 0.001], dtype=torch.float64)
    cos, sin = (torch.cat((each, each), -1) for each in (half.cos(), half.sin()))
    query = torch.randn(1, 1, 1, 8, dtype=torch.float64).expand(1, 12, 1, 8)
    key = torch.randn(1, 1, 1, 8, dtype=torch.float64).expand(1, 12, 1, 8)
    q, k = (each[0, :, 0] for each in rope(query, key, cos, sin))
    products = q @ k.T
    torch.testing.assert_close(products[5, 2], products[11, 8], rtol=1e-12, atol=1e-12)


def test_heads_are_normalised_before_they_turn():
    query = torch.randn(2, 5, 4, 8, dtype=torch.float64, requires_grad=True)
    key = torch.randn(2, 5, 2, 8, dtype=torch.float64, requires_grad=True)
    weights = [torch.randn(8, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    half, cos, sin = angles(5, 6)
    ours = qk_norm_rope(query, key, *weights, cos, sin, eps=1e-5, channels="first")
    for x, weight, y in zip((query, key), weights, ours, strict=True):
        other = turn(F.rms_norm(x, (8,), weight, eps=1e-5), half, "first")
        torch.testing.assert_close(y, other, rtol=1e-12, atol=1e-12)
        grad = torch.randn_like(y)
        pairs = (torch.autograd.grad(each, (x, weight), grad) for each in (y, other))
        for mine, others in zip(*pairs, strict=True):
            torch.testing.assert_close(mine, others, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    ("shapes", "channels", "message"),
    [
        (((2, 5, 4, 8), (2, 5, 2, 8), (5, 8)), "middle", "`channels` must be"),
        (((2, 5, 4, 8), (2, 4, 2, 8), (5, 8)), "last", "`query` and `key` must have shapes"),
        (((2, 5, 4, 8), (2, 5, 2, 8), (4, 8)), "last", "`cos` and `sin` must have shape"),
        (((2, 5, 4, 8), (2, 5, 2, 8), (5, 7)), "last", "an even number of at most 8 channels"),
        (((2, 5, 4, 8), (2, 5, 2, 8), (5, 10)), "last", "an even number of at most 8 channels"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(shapes, channels, message):
    query, key, cos = (torch.randn(shape) for shape in shapes)
    with pytest.raises(ValueError, match=message):
        rope(query, key, cos, cos, channels=channels)
