import pytest
import torch
from torch.nn import functional as F

from lme_kernels.functional import scattermoe
from lme_kernels.ops.scattermoe.activations import ACTIVATIONS
from lme_kernels.ops.scattermoe.plan import Plan, using
from lme_kernels.testing import check_against_reference

T, K, E, H, WIDTH = 11, 2, 5, 6, 4


def double(*shape):
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def arguments(gated):
    indices = torch.randn(T, E - 1).argsort(-1)[:, :K]
    U = 2 * WIDTH if gated else WIDTH
    return double(T, H), double(T, K), indices, double(E, U, H), double(E, H, WIDTH)


FUNCTIONS = {
    "swiglu": F.silu,
    "geglu": F.gelu,
    "reglu": F.relu,
    "glu": torch.sigmoid,
    "sigmoid_glu": torch.sigmoid,
    "silu": F.silu,
    "swish": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu_squared": lambda x: F.relu(x) ** 2,
    "relu2": lambda x: F.relu(x) ** 2,
}


def naive(x, weights, indices, up, down, name, gate_rows, value_rows, up_bias, down_bias):
    """Token after token, choice after choice."""
    outputs = []
    for t in range(T):
        total = 0
        for j in range(K):
            e = int(indices[t, j])
            h = up[e] @ x[t] + up_bias[e]
            y = FUNCTIONS[name](h[gate_rows])
            if value_rows is not None:
                y = y * h[value_rows]
            total = total + weights[t, j] * (down[e] @ y + down_bias[e])
        outputs.append(total)
    return torch.stack(outputs)


# The first is the formula on a CPU, the second the one that is compiled and runs on a GPU.
@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("layout", ["interleaved", "concatenated"])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_values_and_gradients_are_those_of_a_loop_over_tokens(name, layout, traced, monkeypatch):
    gated = ACTIVATIONS[name].gated
    if not gated and layout == "concatenated":
        pytest.skip("without gates there is one layout")
    inputs = arguments(gated)
    biases = {"up_bias": double(*inputs[3].shape[:2]), "down_bias": double(E, H)}
    rows = torch.arange(2 * WIDTH if gated else WIDTH)
    halves = (rows[0::2], rows[1::2]) if layout == "interleaved" else rows.chunk(2)
    gate_rows, value_rows = halves if gated else (rows, None)
    theirs = naive(*inputs, name, gate_rows, value_rows, *biases.values())
    if traced:
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    ours = scattermoe(*inputs, activation=name, layout=layout, backend="torch", **biases)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    leaves = [*(each for each in inputs if each.requires_grad), *biases.values()]
    factor = torch.randn_like(ours)
    for mine, other in zip(
        torch.autograd.grad(ours, leaves, factor),
        torch.autograd.grad(theirs, leaves, factor),
        strict=True,
    ):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-9)


def test_an_expert_without_tokens_gets_a_gradient_of_zeros():
    inputs = arguments(gated=True)
    (grad,) = torch.autograd.grad(scattermoe(*inputs).sum(), inputs[3])
    assert not grad[E - 1].any()
    assert grad[inputs[2][0, 0]].any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "swoosh"}, "`activation` must be one of"),
        ({"layout": "mixed"}, "`layout` must be"),
        ({"x": torch.randn(T, 2, H)}, r"must have shapes \(T, H\), \(E, U, H\) and \(E, H, I\)"),
        ({"up": torch.randn(E, WIDTH, H)}, r"`up` must have shape \(5, 8, 6\), got \(5, 4, 6\)"),
        ({"weights": torch.randn(T, 3)}, r"`weights` must have shape \(11, 2\)"),
        ({"down": torch.randn(E, H, WIDTH)}, "`down` must have the dtype torch.float64"),
        ({"down_bias": torch.randn(E, WIDTH)}, r"`down_bias` must have shape \(5, 6\)"),
        ({"indices": torch.rand(T, K)}, "`indices` must be int32 or int64"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change, message):
    names = ("x", "weights", "indices", "up", "down")
    values = {**dict(zip(names, arguments(gated=True), strict=True)), **change}
    options = {each: values.pop(each) for each in list(values) if each not in names}
    with pytest.raises(ValueError, match=message):
        scattermoe(*values.values(), **options)


PLANS = {
    "grouped_mm": Plan(),
    "triton": Plan(False, False, False, False, False),
    "mixed": Plan(False, True, False, True, True),
    "mixed the other way": Plan(True, False, True, False, False),
}


@pytest.mark.gpu
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("shape", [(513, 4, 9, 256, 192), (2048, 8, 16, 512, 256)], ids=str)
def test_every_plan_matches_float64_in_bfloat16(plan, shape):
    tokens, k, experts, hidden, width = shape
    indices = torch.randn(tokens, experts - 1).argsort(-1)[:, :k]
    call = (
        torch.randn(tokens, hidden),
        torch.rand(tokens, k),
        indices,
        torch.randn(experts, 2 * width, hidden) / hidden**0.5,
        torch.randn(experts, hidden, width) / width**0.5,
    )
    with using(PLANS[plan]):
        check_against_reference(scattermoe, call, {}, backend="triton", dtype=torch.bfloat16)
