import pytest
import torch
from torch.nn import functional as F

from lme_kernels.functional import geglu, relu_squared, swiglu, swiglu_packed


def double(*shape):
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def assert_same(ours, theirs, inputs):
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    grad = torch.randn_like(ours)
    pairs = zip(*(torch.autograd.grad(y, inputs, grad) for y in (ours, theirs)), strict=True)
    for mine, other in pairs:
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("function", "activation"), [(swiglu, F.silu), (geglu, F.gelu)])
def test_gated_units_multiply_by_the_activation(function, activation):
    gate, up = double(3, 5), double(3, 5)
    assert_same(function(gate, up), activation(gate) * up, (gate, up))


def test_packed_halves_are_even_and_odd_channels_or_one_after_the_other():
    x = double(3, 10)
    interleaved = F.silu(x[:, 0::2]) * x[:, 1::2]
    assert_same(swiglu_packed(x), interleaved, (x,))
    concatenated = F.silu(x[:, :5]) * x[:, 5:]
    assert_same(swiglu_packed(x, layout="concatenated"), concatenated, (x,))


def test_relu_squared_squares_the_positive_part():
    x = double(4, 6)
    assert_same(relu_squared(x), F.relu(x) ** 2, (x,))
    assert relu_squared(torch.tensor([float("nan")])).isnan().all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: swiglu(torch.randn(2, 3), torch.randn(2, 4)), "`up` must have the shape"),
        (lambda: swiglu(torch.randn(2), torch.randn(2).double()), "dtype torch.float32 of `gate`"),
        (lambda: swiglu_packed(torch.randn(2, 3)), "`x` must have an even number of channels"),
        (lambda: swiglu_packed(torch.randn(2, 4), layout="halves"), "`layout` must be"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
