"""Modules against torch's own, or against loops and formulas, values and gradients in float64."""

import pytest
import torch
from torch.nn import functional as F

from lme_kernels import nn
from lme_kernels.op import UnsupportedBackendError

DTYPE = torch.float64


def rows(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=DTYPE)


def draw_parameters(module):
    for index, parameter in enumerate(module.parameters()):
        parameter.data = rows(*parameter.shape, seed=10 + index) * 0.4
    return module


def assert_same(ours, theirs, module, other, x):
    """Values, and gradients of the input and of every parameter."""
    torch.testing.assert_close(ours, theirs)
    weight = rows(*ours.shape, seed=5)
    mine = torch.autograd.grad(ours, (x, *module.parameters()), weight)
    his = torch.autograd.grad(theirs, (x, *other), weight)
    for one, two in zip(mine, his, strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [(nn.RMSNorm, torch.nn.RMSNorm), (nn.LayerNorm, torch.nn.LayerNorm)],
)
def test_norms_have_the_state_and_the_numbers_of_torch(ours, theirs, affine):
    module = draw_parameters(ours(7, eps=1e-3, elementwise_affine=affine, dtype=DTYPE))
    other = theirs(7, eps=1e-3, elementwise_affine=affine, dtype=DTYPE)
    other.load_state_dict(module.state_dict())
    x = rows(3, 5, 7).requires_grad_()
    assert_same(module(x), other(x), module, tuple(other.parameters()), x)


def test_a_layernorm_may_have_no_shift():
    assert [name for name, _ in nn.LayerNorm(4, bias=False).named_parameters()] == ["weight"]


@pytest.mark.parametrize("norm_before_gate", [False, True])
def test_the_gated_norm_is_the_formula(norm_before_gate):
    module = draw_parameters(nn.GatedRMSNorm(7, norm_before_gate=norm_before_gate, dtype=DTYPE))
    x, gate = rows(4, 7).requires_grad_(), rows(4, 7, seed=1)
    if norm_before_gate:
        expected = F.rms_norm(x, (7,), module.weight, 1e-6) * F.silu(gate)
    else:
        expected = F.rms_norm(x * F.silu(gate), (7,), module.weight, 1e-6)
    assert_same(module(x, gate), expected, module, (module.weight,), x)


def test_the_p_norm_is_the_formula():
    module = draw_parameters(nn.PNorm(7, p=3.0, dtype=DTYPE))
    x = rows(4, 7).requires_grad_()
    expected = module.weight * F.normalize(x, p=3.0, dim=-1, eps=1e-6)
    assert_same(module(x), expected, module, (module.weight,), x)


@pytest.mark.parametrize(
    ("module", "arguments", "formula"),
    [
        (nn.SwiGLU(), 2, lambda gate, up: F.silu(gate) * up),
        (nn.GEGLU(), 2, lambda gate, up: F.gelu(gate) * up),
        (nn.ReLUSquared(), 1, lambda x: F.relu(x) ** 2),
        (nn.PackedSwiGLU(), 1, lambda x: F.silu(x[..., ::2]) * x[..., 1::2]),
        (nn.PackedSwiGLU("concatenated"), 1, lambda x: F.silu(x[..., :4]) * x[..., 4:]),
    ],
    ids=lambda each: type(each).__name__,
)
def test_activations_are_their_formulas(module, arguments, formula):
    given = [rows(3, 8, seed=index).requires_grad_() for index in range(arguments)]
    ours, expected = module(*given), formula(*given)
    torch.testing.assert_close(ours, expected)
    weight = rows(*ours.shape, seed=5)
    for one, two in zip(
        torch.autograd.grad(ours, given, weight),
        torch.autograd.grad(expected, given, weight),
        strict=True,
    ):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_losses_are_those_of_torch(reduction):
    head = nn.LinearCrossEntropyLoss(
        5, 11, reduction=reduction, label_smoothing=0.1, ignore_index=3, dtype=DTYPE
    )
    draw_parameters(head)
    x = rows(2, 4, 5).requires_grad_()
    labels = torch.tensor([[0, 3, 10, 2], [3, 7, 1, 1]])
    logits = x @ head.weight.T
    plain = {"reduction": reduction, "label_smoothing": 0.1, "ignore_index": 3}
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), **plain)
    expected = expected.reshape(labels.shape) if reduction == "none" else expected
    assert_same(head(x, labels), expected, head, (head.weight,), x)
    torch.testing.assert_close(nn.CrossEntropyLoss(**plain)(logits, labels), expected)


def test_the_output_layer_has_the_state_of_a_linear():
    head = nn.LinearCrossEntropyLoss(5, 11)
    torch.nn.Linear(5, 11, bias=False).load_state_dict(head.state_dict())
    # 55 draws of deviation 5^-0.5 = 0.45: their own deviates by some 10 %.
    assert 0.3 < float(head.weight.std()) < 0.6


@pytest.mark.parametrize("activation", [None, "silu"])
def test_the_convolution_is_torch_s_with_the_future_cut_off(activation):
    module = draw_parameters(nn.CausalConv1d(6, 3, activation=activation, dtype=DTYPE))
    x = rows(2, 9, 6).requires_grad_()
    y = F.conv1d(x.transpose(1, 2), module.weight[:, None], module.bias, padding=2, groups=6)
    y = y[..., :9].transpose(1, 2)
    expected = y if activation is None else F.silu(y)
    assert_same(module(x), expected, module, tuple(module.parameters()), x)


def scan(module, x, state):
    """All states by a loop over tokens, from the module's parameters."""
    projected = module.input_projection(x)
    gates = projected.unflatten(-1, (len(module.gates), module.num_heads, module.head_dim))
    matrix = {gate: module.get_parameter(f"{gate}_weight") for gate in module.gates}
    h, c, states = state, torch.zeros_like(state), []

    def gate(name, t, h):
        return gates[:, t, module.gates.index(name)] + torch.einsum("bni,nij->bnj", h, matrix[name])

    for t in range(x.shape[1]):
        if isinstance(module, nn.RNN):
            h = gate("state", t, h).tanh()
        elif isinstance(module, nn.GRU):
            f, r = gate("forget", t, h).sigmoid(), gate("reset", t, h).sigmoid()
            h = f * h + (1 - f) * gate("state", t, r * h).tanh()
        else:
            g = gate("state", t, h).tanh()
            f, i = gate("forget", t, h).sigmoid(), gate("input", t, h).sigmoid()
            c = f * c + i * g
            h = gate("output", t, h).sigmoid() * c.tanh()
        states.append(h)
    return torch.stack(states, 1).flatten(-2), h


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_recurrences_are_loops_over_tokens(kind):
    module = draw_parameters(kind(5, 2, 4, dtype=DTYPE))
    x, state = rows(3, 6, 5).requires_grad_(), rows(3, 2, 4, seed=3)
    ours, last, *_ = module(x, initial_state=state)
    expected, expected_last = scan(module, x, state)
    torch.testing.assert_close(last, expected_last)
    assert_same(ours, expected, module, tuple(module.parameters()), x)
    # Packed: each sequence starts from its own state.
    cu_seqlens = torch.tensor([0, 6, 12, 18], dtype=torch.int32)
    packed, *_ = module(x.flatten(0, 1), initial_state=state, cu_seqlens=cu_seqlens, max_seqlen=6)
    torch.testing.assert_close(packed.reshape(3, 6, 8), expected)


def test_a_backend_that_is_named_is_asked():
    with pytest.raises(UnsupportedBackendError):
        nn.RMSNorm(4, backend="nki")(torch.ones(2, 4))
    assert "backend=nki" in repr(nn.SwiGLU(backend="nki"))
