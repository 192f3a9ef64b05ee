import pytest
import torch
from torch.nn import functional as F

from lme_core.architectures.gpt_base import GPTBaseConfig
from lme_core.layers.normalization import build_norm
from lme_kernels.policy import KernelPolicy


def reference(kind, x, weight, bias, eps, p):
    if kind == "layernorm":
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    if kind == "rmsnorm":
        return F.rms_norm(x, x.shape[-1:], weight, eps)
    return weight * F.normalize(x, p=p, dim=-1, eps=eps)


@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm", "p_norm"])
# Alone; added to the residual as it is; scaled first.
@pytest.mark.parametrize("scale", [None, 1.0, 0.22])
def test_values_and_gradients_are_those_of_torch(kind, scale):
    torch.manual_seed(0)
    config = GPTBaseConfig(normalization_function=kind, layer_norm_epsilon=1e-3, p_norm_order=3.0)
    norm = build_norm(config, 24, KernelPolicy()).double()
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.copy_(torch.randn_like(parameter))
    x, residual = torch.randn(2, 4, 6, 24, dtype=torch.float64, requires_grad=True).unbind()
    total = x if scale is None else residual + scale * x
    expected = reference(kind, total, norm.weight, norm.bias, 1e-3, 3.0)
    if scale is None:
        ours = norm(x)
    else:
        ours, new_residual = norm(x, residual, scale)
        torch.testing.assert_close(new_residual, total, rtol=1e-14, atol=0)
    # Rounding in float64 only.
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    inputs = [x, *norm.parameters()] + ([] if scale is None else [residual])
    grad = torch.randn_like(x)
    got = torch.autograd.grad(ours, inputs, grad)
    for ours_grad, its_grad in zip(got, torch.autograd.grad(expected, inputs, grad), strict=True):
        torch.testing.assert_close(ours_grad, its_grad, rtol=1e-9, atol=1e-12)


def test_only_layernorm_has_a_bias_and_nothing_is_decayed():
    for kind, names in (("layernorm", {"weight", "bias"}), ("rmsnorm", {"weight"})):
        config = GPTBaseConfig(normalization_function=kind)
        specs = build_norm(config, 8, KernelPolicy()).parameter_specs()
        assert specs.keys() == names
        assert not any(spec.weight_decay or spec.mup for spec in specs.values())
