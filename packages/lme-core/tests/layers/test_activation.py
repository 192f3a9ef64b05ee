import pytest
import torch
from torch import nn

from lme_core.layers.activation import ACTIVATIONS, Activation, base_of, check_activation, is_glu
from lme_kernels.policy import KernelPolicy


class ReluSquared(nn.Module):
    def forward(self, x):
        return x.clamp(min=0) ** 2


# The modules of torch that the names stand for.
REFERENCES = {
    "celu": nn.CELU(),
    "elu": nn.ELU(),
    "gelu": nn.GELU(),
    "gelu_pytorch_tanh": nn.GELU(approximate="tanh"),
    "selu": nn.SELU(),
    "hard_shrink": nn.Hardshrink(),
    "hard_sigmoid": nn.Hardsigmoid(),
    "hard_swish": nn.Hardswish(),
    "hard_tanh": nn.Hardtanh(),
    "identity": nn.Identity(),
    "leaky_reLU": nn.LeakyReLU(),
    "log_sigmoid": nn.LogSigmoid(),
    "mish": nn.Mish(),
    "prelu": nn.PReLU(dtype=torch.float64),
    "relu": nn.ReLU(),
    "relu2": ReluSquared(),
    "relu_squared": ReluSquared(),
    "relu6": nn.ReLU6(),
    "rrelu": nn.RReLU().eval(),
    "sigmoid": nn.Sigmoid(),
    "silu": nn.SiLU(),
    "swish": nn.SiLU(),
    "softplus": nn.Softplus(),
    "soft_plus": nn.Softplus(),
    "soft_shrink": nn.Softshrink(),
    "soft_sign": nn.Softsign(),
    "tanh": nn.Tanh(),
    "tanh_shrink": nn.Tanhshrink(),
}
GLUS = {
    "glu": "sigmoid",
    "ceglu": "celu",
    "eglu": "elu",
    "geglu": "gelu",
    "miglu": "mish",
    "mishglu": "mish",
    "preglu": "prelu",
    "reglu": "relu",
    "rreglu": "rrelu",
    "seglu": "selu",
    "swiglu": "silu",
} | {f"{base}_glu": base for base in REFERENCES}


def build(name):
    activation = Activation(name, KernelPolicy()).double()
    if activation.weight is not None:
        nn.init.constant_(activation.weight, 0.25)
    return activation


def test_every_name_is_tested():
    assert set(ACTIVATIONS) == REFERENCES.keys() | GLUS.keys()
    assert {name for name in ACTIVATIONS if is_glu(name)} == GLUS.keys()


# Rounding in float64 only: formulas may be arranged differently.
@pytest.mark.parametrize("name", REFERENCES)
def test_values_and_gradients_are_those_of_torch(name):
    torch.manual_seed(0)
    x = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    ours, reference = build(name)(x), REFERENCES[name](x)
    torch.testing.assert_close(ours, reference, rtol=1e-12, atol=1e-12)
    grad = torch.randn_like(x)
    expected = torch.autograd.grad(reference, x, grad)[0]
    torch.testing.assert_close(torch.autograd.grad(ours, x, grad)[0], expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("layout", ["interleaved", "concatenated"])
@pytest.mark.parametrize("name", GLUS)
def test_a_glu_multiplies_up_by_a_function_of_gate(name, layout):
    torch.manual_seed(0)
    gate = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    up = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    if layout == "interleaved":
        packed = torch.stack((gate, up), dim=-1).flatten(-2)
    else:
        packed = torch.cat((gate, up), dim=-1)
    ours, reference = build(name)(packed, layout), up * REFERENCES[GLUS[name]](gate)
    torch.testing.assert_close(ours, reference, rtol=1e-12, atol=1e-12)
    grad = torch.randn_like(up)
    for got, expected in zip(
        torch.autograd.grad(ours, (gate, up), grad),
        torch.autograd.grad(reference, (gate, up), grad),
        strict=True,
    ):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


def test_the_slope_of_prelu_is_trained_without_decay():
    activation = build("prelu_glu")
    spec = activation.parameter_specs()["weight"]
    assert not spec.weight_decay
    assert spec.initial(0, (1,)).item() == 0.25
    assert build("swiglu").parameter_specs() == {}


def test_an_unknown_name_is_refused_with_a_close_one():
    with pytest.raises(ValueError, match=r"`activation_function` is `swigul`.*mean `swiglu`"):
        check_activation("swigul")
    with pytest.raises(ValueError, match="Known: celu"):
        base_of("xyz")
