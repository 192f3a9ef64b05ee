import pytest
import torch
from torch.nn import functional as F

from lme_kernels.functional import layernorm


@pytest.mark.parametrize("with_weight", [True, False])
@pytest.mark.parametrize("with_bias", [True, False])
def test_layernorm_is_torchs(with_weight, with_bias):
    x = torch.randn(3, 5, 17, dtype=torch.float64, requires_grad=True)
    inputs = [x]
    weight, bias = (
        torch.randn(17, dtype=torch.float64, requires_grad=True) if wanted else None
        for wanted in (with_weight, with_bias)
    )
    inputs += [each for each in (weight, bias) if each is not None]
    ours = layernorm(x, weight, bias, eps=1e-5)
    theirs = F.layer_norm(x, (17,), weight, bias, 1e-5)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    grad = torch.randn_like(x)
    pairs = zip(
        torch.autograd.grad(ours, inputs, grad),
        torch.autograd.grad(theirs, inputs, grad),
        strict=True,
    )
    for mine, other in pairs:
        torch.testing.assert_close(mine, other, rtol=1e-11, atol=1e-11)


def test_parameters_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"`bias` must have shape \(3,\)"):
        layernorm(torch.randn(2, 3), torch.randn(3), torch.randn(2))
