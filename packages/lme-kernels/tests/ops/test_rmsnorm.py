import pytest
import torch
from torch.nn import functional as F

from lme_kernels.functional import fused_residual_add_rmsnorm, gated_rmsnorm, rmsnorm

EXACT = {"rtol": 1e-12, "atol": 1e-12}


def double(*shape):
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def assert_same(ours, theirs, inputs):
    """Values and gradients of two graphs over the same inputs agree in float64."""
    torch.testing.assert_close(ours, theirs, **EXACT)
    weight = torch.randn_like(ours)
    gradients = (torch.autograd.grad(y, inputs, weight, retain_graph=True) for y in (ours, theirs))
    for mine, other in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, other, **EXACT)


@pytest.mark.parametrize("shape", [(2, 3, 17), (5, 1), (8,)], ids=str)
def test_rmsnorm_is_torchs(shape):
    x, weight = double(*shape), double(shape[-1])
    theirs = F.rms_norm(x, shape[-1:], weight, eps=1e-5)
    assert_same(rmsnorm(x, weight, eps=1e-5), theirs, (x, weight))
    bare = F.rms_norm(x, shape[-1:], None, eps=1e-5)
    assert_same(rmsnorm(x, None, eps=1e-5), bare, (x,))


def test_rmsnorm_rounds_once():
    x = torch.randn(64, 256).bfloat16()
    weight = torch.randn(256).bfloat16()
    exact = rmsnorm(x.double(), weight.double())
    assert torch.equal(rmsnorm(x, weight), rmsnorm(x.float(), weight.float()).bfloat16())
    # Half a unit in the last place of bfloat16, which has 8 bits.
    error = (rmsnorm(x, weight).double() - exact).abs() / exact.abs().clamp(min=1e-9)
    assert error.max() <= 2.0**-8


def test_residual_addition_is_the_sum_and_its_norm():
    x, residual, weight = double(4, 9), double(4, 9), double(9)
    y, new = fused_residual_add_rmsnorm(x, residual, weight, eps=1e-5, scale=0.22)
    theirs = residual + 0.22 * x
    assert_same(new, theirs, (x, residual))
    assert_same(y, F.rms_norm(theirs, (9,), weight, eps=1e-5), (x, residual, weight))


def test_the_rounded_sum_is_normalised():
    x, residual = torch.randn(8, 64).bfloat16(), torch.randn(8, 64).bfloat16()
    y, new = fused_residual_add_rmsnorm(x, residual, None)
    assert torch.equal(new, residual + x)
    assert torch.equal(y, rmsnorm(new, None))


def test_the_gate_acts_before_or_after():
    x, gate, weight = double(4, 9), double(4, 9), double(9)
    before = F.rms_norm(x * F.silu(gate), (9,), weight, eps=1e-6)
    assert_same(gated_rmsnorm(x, gate, weight), before, (x, gate, weight))
    after = F.rms_norm(x, (9,), weight, eps=1e-6) * F.silu(gate)
    ours = gated_rmsnorm(x, gate, weight, norm_before_gate=True)
    assert_same(ours, after, (x, gate, weight))


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        (rmsnorm, ((2, 3), (4,)), r"`weight` must have shape \(3,\) to match `x`, got \(4,\)"),
        (fused_residual_add_rmsnorm, ((2, 3), (3,), (3,)), "`residual` must have the shape"),
        (fused_residual_add_rmsnorm, ((2, 3), (2, 3), (2,)), "`weight` must have shape"),
        (gated_rmsnorm, ((2, 3), (2, 4), (3,)), "`gate` must have the shape"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(function, arguments, message):
    with pytest.raises(ValueError, match=message):
        function(*(torch.randn(shape) for shape in arguments))
