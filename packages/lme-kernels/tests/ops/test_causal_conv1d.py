import pytest
import torch
from torch.nn import functional as F

from lme_kernels.functional import causal_conv1d
from lme_kernels.packing import cu_seqlens_from_lengths
from lme_kernels.testing import assert_matches

# Empty sequences at both ends and in the middle; one shorter than the taps.
LENGTHS = [0, 5, 2, 0, 7, 0]
T, C = 14, 3


def double(*shape):
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def naive(x, weight, bias, state, activation):
    """One sequence through torch's convolution; shapes (S, C) and (C, W - 1)."""
    W = weight.shape[1]
    padded = torch.cat((state, x.mT), 1)
    y = x.mT
    if x.shape[0] > 0:
        y = F.conv1d(padded.unsqueeze(0), weight.unsqueeze(1), bias, groups=C).squeeze(0)
    y = F.silu(y) if activation == "silu" else y
    return y.mT, padded[:, padded.shape[1] - (W - 1) :]


def assert_same(ours, theirs, inputs):
    weights = [torch.randn_like(each) for each in ours]
    of_ours = torch.autograd.grad(ours, inputs, weights)
    of_theirs = torch.autograd.grad(theirs, inputs, weights)
    for mine, other in zip((*ours, *of_ours), (*theirs, *of_theirs), strict=True):
        assert_matches(mine, other)


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("W", [1, 2, 4])
def test_packed_sequences_are_convolutions_of_their_own(W, activation):
    x, weight, bias, initial = double(T, C), double(C, W), double(C), double(6, C, W - 1)
    ours = causal_conv1d(
        x,
        weight,
        bias,
        activation=activation,
        initial_state=initial,
        return_final_state=True,
        cu_seqlens=cu_seqlens_from_lengths(torch.tensor(LENGTHS)),
    )
    parts = zip(x.split(LENGTHS), initial, strict=True)
    results = [naive(part, weight, bias, state, activation) for part, state in parts]
    theirs = (torch.cat([y for y, _ in results]), torch.stack([state for _, state in results]))
    inputs = (x, weight, bias) if W == 1 else (x, weight, bias, initial)
    assert_same(ours, theirs, inputs)


@pytest.mark.parametrize("S", [1, 6])
def test_a_batch_is_one_convolution_a_row(S):
    x, weight = double(2, S, C), double(C, 4)
    ours = causal_conv1d(x, weight, activation="silu", return_final_state=True)
    zeros = torch.zeros(C, 3, dtype=torch.float64)
    results = [naive(row, weight, None, zeros, "silu") for row in x]
    theirs = tuple(torch.stack(each) for each in zip(*results, strict=True))
    assert_same(ours, theirs, (x, weight))


def test_the_final_state_continues_the_sequence():
    x, weight = torch.randn(2, 9, C), torch.randn(C, 4)
    whole = causal_conv1d(x, weight)
    first, state = causal_conv1d(x[:, :2], weight, return_final_state=True)
    second = causal_conv1d(x[:, 2:], weight, initial_state=state)
    assert_matches(torch.cat((first, second), 1), whole)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.randn(4, C)}, r"`x` must have shape \(B, S, C\)"),
        ({"weight": torch.randn(C, 1, 4)}, r"`weight` must have shape \(3, W\)"),
        ({"bias": torch.randn(1)}, r"`bias` must have shape \(3,\), got \(1,\)"),
        ({"initial_state": torch.randn(2, C, 4)}, "`initial_state` must have shape"),
        ({"activation": "gelu"}, "`activation` must be"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change, message):
    arguments = {"x": torch.randn(2, 4, C), "weight": torch.randn(C, 4)}
    with pytest.raises(ValueError, match=message):
        causal_conv1d(**{**arguments, **change})
