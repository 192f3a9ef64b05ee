"""What only a GPU can prove: bfloat16 at the sizes of models, graphs, no waiting, large offsets."""

import pytest
import torch

from lme_kernels.examples import examples_of
from lme_kernels.functional import (
    ALL_OPS,
    attention,
    fused_residual_add_rmsnorm,
    gated_rmsnorm,
    geglu,
    layernorm,
    p_norm,
    qk_norm_rope,
    relu_squared,
    rmsnorm,
    rope,
    softmax,
    swiglu,
    swiglu_packed,
)
from lme_kernels.inspection import count_calls
from lme_kernels.testing import assert_matches, check_against_reference, fused_backends, run

pytestmark = pytest.mark.gpu

FUSED = [
    pytest.param(op, backend, id=f"{op.name}@{backend}")
    for op in ALL_OPS.values()
    for backend in fused_backends(op)
    if backend in ("triton", "cuda")
]


def angles(S, R):
    half = torch.rand(S, R // 2) * 6
    return torch.cat((half.cos(), half.cos()), -1), torch.cat((half.sin(), half.sin()), -1)


# Widths of models, and one that no power of two divides.
ROWS = {
    "rmsnorm": lambda H: (rmsnorm, (torch.randn(515, H), torch.randn(H)), {}, ()),
    "fused_residual_add_rmsnorm": lambda H: (
        fused_residual_add_rmsnorm,
        (torch.randn(515, H), torch.randn(515, H), torch.randn(H)),
        {"scale": 0.22},
        (),
    ),
    "layernorm": lambda H: (
        layernorm,
        (torch.randn(515, H), torch.randn(H), torch.randn(H)),
        {},
        (),
    ),
    "gated_rmsnorm": lambda H: (
        gated_rmsnorm,
        (torch.randn(515, H), torch.randn(515, H), torch.randn(H)),
        {},
        (),
    ),
    "p_norm": lambda H: (p_norm, (torch.randn(515, H), torch.randn(H)), {}, ()),
    "softmax": lambda H: (softmax, (torch.randn(515, H) * 3,), {}, ()),
    "swiglu": lambda H: (swiglu, (torch.randn(515, H), torch.randn(515, H)), {}, ()),
    "geglu": lambda H: (geglu, (torch.randn(515, H), torch.randn(515, H)), {}, ()),
    "relu_squared": lambda H: (relu_squared, (torch.randn(515, H),), {}, ()),
    "swiglu_packed": lambda H: (swiglu_packed, (torch.randn(515, 2 * H),), {}, ()),
}


@pytest.mark.parametrize("H", [64, 768, 4096, 5120, 8192, 11007, 16384, 32768])
@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_rows_of_models_match_float64(name, H, dtype):
    function, arguments, options, constants = ROWS[name](H)
    check_against_reference(
        function, arguments, options, backend="triton", dtype=dtype, constants=constants
    )


@pytest.mark.parametrize(("D", "R"), [(64, 64), (128, 128), (128, 64), (96, 32), (256, 256)])
@pytest.mark.parametrize("channels", ["last", "first"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_heads_of_models_match_float64(D, R, channels, dtype):
    query, key = torch.randn(2, 129, 12, D), torch.randn(2, 129, 3, D)
    cos, sin = angles(129, R)
    check_against_reference(
        rope,
        (query, key, cos, sin),
        {"channels": channels},
        backend="triton",
        dtype=dtype,
        constants=(2, 3),
    )
    check_against_reference(
        qk_norm_rope,
        (query, key, torch.randn(D), torch.randn(D), cos, sin),
        {"channels": channels},
        backend="triton",
        dtype=dtype,
        constants=(4, 5),
    )


def first_call(op):
    """Arguments, options and positions of constants of an op's first example, on the GPU."""
    example = examples_of(op)[0]

    def placed(value):
        return value.cuda() if isinstance(value, torch.Tensor) else value

    arguments = [placed(each) for each in example.arguments]
    options = {name: placed(each) for name, each in example.options.items()}
    return arguments, options, example.constants


@pytest.mark.parametrize(("op", "backend"), FUSED)
def test_automatic_choice_is_the_fused_kernel(op, backend):
    arguments, options, _ = first_call(op)
    with count_calls() as counts:
        op.function(*arguments, **options)
    first = next((each for each in op.implementations if each not in op.manual), None)
    if backend == first:
        assert counts == {f"{op.name}@{backend}": 1}


@pytest.mark.parametrize(("op", "backend"), FUSED)
def test_a_call_does_not_wait_for_the_device_and_can_be_captured(op, backend):
    arguments, options, constants = first_call(op)
    leaves = []
    for position, each in enumerate(arguments):
        differentiable = isinstance(each, torch.Tensor) and each.is_floating_point()
        if differentiable and position not in constants:
            leaves.append(each.requires_grad_())

    def step(weights):
        result = op.function(*arguments, **options, backend=backend)
        outputs = result if isinstance(result, tuple) else (result,)
        if not weights:
            weights.extend(torch.ones_like(each) for each in outputs)
        if not leaves:
            return outputs
        pairs = [each for each in zip(outputs, weights, strict=True) if each[0].requires_grad]
        differentiable, factors = zip(*pairs, strict=True)
        return (*outputs, *torch.autograd.grad(differentiable, leaves, factors))

    weights = []
    # Detached: a graph that outlives the step keeps its leaves bound to the stream they were on.
    expected = [each.detach().clone() for each in step(weights)]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(weights)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step(weights)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = [each.detach() for each in step(weights)]
    for each in captured:
        each.zero_()
    graph.replay()
    for ours, theirs in zip(captured, expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.slow
@pytest.mark.parametrize(
    "function",
    [
        lambda x: rmsnorm(x, None),
        softmax,
        lambda x: layernorm(x, None, None),
        relu_squared,
        lambda x: swiglu(x, x),
        swiglu_packed,
        lambda x: swiglu_packed(x, layout="concatenated"),
    ],
)
def test_more_than_two_to_the_31_elements(function):
    H = 8192
    rows = 2**31 // H + 17
    x = torch.empty(rows, H, device="cuda", dtype=torch.bfloat16).normal_()
    x.requires_grad_()
    y = function(x)
    (grad,) = torch.autograd.grad(y.sum(), x)
    del y
    # Rows on both sides of the limit and the last one.
    for row in (0, 2**31 // H - 1, 2**31 // H, rows - 1):
        alone = x[row : row + 1].detach().clone().requires_grad_()
        (expected,) = torch.autograd.grad(function(alone).sum(), alone)
        assert torch.equal(grad[row : row + 1], expected)


CALLS = {
    "causal": {},
    "not causal": {"causal": False},
    "window": {"window": 100},
    "documents": {
        "cu_seqlens": torch.tensor([0, 100, 400, 512, 512, 700, 1024], dtype=torch.int32)
    },
    "bounded": {"softcap": 3.0},
    "sinks": {"sinks": torch.randn(8)},
}


@pytest.mark.parametrize("name", CALLS)
def test_attention_chosen_automatically_matches_float64(name):
    query, key, value = (
        torch.randn(2, 512, 8, 64),
        torch.randn(2, 512, 2, 64),
        torch.randn(2, 512, 2, 64),
    )
    check_against_reference(
        attention,
        (query, key, value),
        CALLS[name],
        backend=None,
        dtype=torch.bfloat16,
        where="cuda",
    )


@pytest.mark.parametrize("backend", ["cudnn", "flash", "efficient", "flex"])
def test_each_kernel_of_torch_matches_float64(backend):
    query, key, value = (
        torch.randn(2, 300, 8, 64),
        torch.randn(2, 300, 2, 64),
        torch.randn(2, 300, 2, 64),
    )
    if backend == "efficient":
        # It has no shared key heads.
        key, value = torch.randn(2, 300, 8, 64), torch.randn(2, 300, 8, 64)
    check_against_reference(
        attention, (query, key, value), {}, backend=backend, dtype=torch.bfloat16, where="cuda"
    )


@pytest.mark.parametrize("function", [rmsnorm])
def test_inductor_calls_the_kernel(function):
    torch._dynamo.reset()
    x, weight = torch.randn(64, 768, device="cuda"), torch.randn(768, device="cuda")
    compiled = torch.compile(function, fullgraph=True)
    ours = run(compiled, (x, weight), {"eps": 1e-5})
    theirs = run(function, (x, weight), {"eps": 1e-5})
    pairs = zip((*ours.outputs, *ours.gradients), (*theirs.outputs, *theirs.gradients), strict=True)
    for mine, other in pairs:
        assert_matches(mine, other)
