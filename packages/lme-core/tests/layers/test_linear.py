import pytest
import torch
from torch.nn import functional as F

from lme_core.layers.linear import GatedLinear


# Few tokens keep the order of the rows; many pay for sorting them.
@pytest.mark.parametrize(("tokens", "layout"), [(4, "interleaved"), (256, "concatenated")])
@pytest.mark.parametrize("bias", [True, False])
def test_both_layouts_hold_the_same_numbers_and_gradients(tokens, layout, bias):
    torch.manual_seed(0)
    linear = GatedLinear(6, 10, bias=bias, std=1.0, mup=True).double()
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.copy_(torch.randn_like(parameter))
    x = torch.randn(tokens, 6, dtype=torch.float64, requires_grad=True)
    assert linear.layout(x) == layout
    packed = F.linear(x, linear.weight, linear.bias)
    y = linear(x)
    gate, up = (y[:, 0::2], y[:, 1::2]) if layout == "interleaved" else y.chunk(2, dim=-1)
    # Products in another order: rounding in float64.
    torch.testing.assert_close(gate, packed[:, 0::2], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(up, packed[:, 1::2], rtol=1e-12, atol=1e-12)
    weights = torch.randn(2, tokens, 5, dtype=torch.float64)
    inputs = [x, *linear.parameters()]
    got = torch.autograd.grad((gate * weights[0] + up * weights[1]).sum(), inputs)
    expected = torch.autograd.grad(
        (packed[:, 0::2] * weights[0] + packed[:, 1::2] * weights[1]).sum(), inputs
    )
    for ours, reference in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-12, atol=1e-12)
