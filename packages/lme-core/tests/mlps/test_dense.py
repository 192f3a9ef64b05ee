import pytest
import torch
from torch.nn import functional as F

from lme_core.architectures.gpt_base import GPTBaseConfig
from lme_core.layers.context import SequenceContext
from lme_core.layers.dropout import dropout
from lme_core.mlps.dense import DenseMLPConfig
from lme_kernels.policy import KernelPolicy

SETTINGS = GPTBaseConfig(hidden_size=12, position_embedding_type="nope")


def build(**fields):
    mlp = DenseMLPConfig(**fields).build(SETTINGS, 0, KernelPolicy()).double()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in mlp.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return mlp


@pytest.mark.parametrize("bias", [True, False])
# Gated and not; 10 tokens and 160, which take different layouts.
@pytest.mark.parametrize("tokens", [5, 80])
@pytest.mark.parametrize("name", ["swiglu", "relu_glu", "gelu_pytorch_tanh"])
def test_values_and_gradients_match_the_formula(name, tokens, bias):
    mlp = build(activation_function=name, intermediate_size=20, add_bias=bias)
    x = torch.randn(2, tokens, 12, dtype=torch.float64, requires_grad=True)
    parameters = dict(mlp.named_parameters())
    if name.endswith("glu"):
        first = F.linear(x, parameters["gate_up.weight"], parameters.get("gate_up.bias"))
        gate = first[..., 0::2]
        inner = first[..., 1::2] * (F.silu(gate) if name == "swiglu" else F.relu(gate))
    else:
        first = F.linear(x, parameters["up.weight"], parameters.get("up.bias"))
        inner = F.gelu(first, approximate="tanh")
    expected = F.linear(inner, parameters["down.weight"], parameters.get("down.bias"))
    ours, _ = mlp(x, SequenceContext())
    # Rounding in float64 only.
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    grad = torch.randn_like(x)
    inputs = [x, *mlp.parameters()]
    for got, its in zip(
        torch.autograd.grad(ours, inputs, grad),
        torch.autograd.grad(expected, inputs, grad),
        strict=True,
    ):
        torch.testing.assert_close(got, its, rtol=1e-9, atol=1e-12)


# Golden order of the seed system: up [1, 2] and gate [3, 4] are stored as 3 1 4 2.
def test_rows_of_gate_and_up_alternate():
    mlp = build(activation_function="glu", intermediate_size=2)
    with torch.no_grad():
        mlp.gate_up.weight.copy_(torch.tensor([3.0, 1.0, 4.0, 2.0])[:, None].expand(4, 12) / 12)
        mlp.down.weight.copy_(torch.eye(12, 2))
    y, _ = mlp(torch.ones(1, 1, 12, dtype=torch.float64), SequenceContext())
    expected = torch.tensor([1.0, 2.0]) * torch.sigmoid(torch.tensor([3.0, 4.0]))
    torch.testing.assert_close(y[0, 0, :2], expected.double(), rtol=1e-6, atol=0)


def test_shapes_and_traits_are_those_of_the_seed_system():
    config = DenseMLPConfig(activation_function="swiglu", intermediate_size=64, add_bias=True)
    mlp = config.build(GPTBaseConfig(hidden_size=48), 0, KernelPolicy())
    shapes = {name: tuple(p.shape) for name, p in mlp.named_parameters()}
    assert shapes == {
        "gate_up.weight": (128, 48),
        "gate_up.bias": (128,),
        "down.weight": (48, 64),
        "down.bias": (48,),
    }
    for linear in (mlp.gate_up, mlp.down):
        specs = linear.parameter_specs()
        assert specs["weight"].mup
        assert specs["weight"].weight_decay
        assert not specs["bias"].mup
        assert not specs["bias"].weight_decay


def test_dropout_is_applied_to_the_output_in_training_only():
    mlp = build(activation_function="swiglu", dropout=0.5)
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    index = torch.arange(10).view(2, 5)
    key = torch.tensor(3)
    plain, _ = mlp(x, SequenceContext())
    dropped, _ = mlp(x, SequenceContext(dropout_key=key, token_index=index))
    assert torch.equal(dropped, dropout(plain, 0.5, key, 8, index))
    assert not torch.equal(dropped, plain)


def test_the_default_width_is_four_times_the_hidden_size():
    assert build().up.weight.shape == (48, 12)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"intermediate_size": 0}, "`intermediate_size` must be at least 1, got 0"),
        ({"activation_function": "swigly"}, "did you mean `swiglu`"),
        ({"dropout": 1.5}, "`dropout` must be at least 0 and below 1, got 1.5"),
    ],
    ids=str,
)
def test_a_wrong_setting_is_refused_by_name(fields, message):
    with pytest.raises(ValueError, match=message):
        DenseMLPConfig(**fields)
