"""The Pallas back ends of ops on torch tensors, with torch_xla driving a CPU."""

import pytest
import torch

pytest.importorskip("jax")
pytest.importorskip("torch_xla")

from lme_kernels import pallas
from lme_kernels.examples import examples_of
from lme_kernels.functional import ALL_OPS
from lme_kernels.op import UnsupportedBackendError
from lme_kernels.testing import check_against_reference

# What the bridge has to carry: arguments left out, integers, states, empty ones, several results.
# The other examples are proven in jax, where they compile faster.
LEFT_TO_JAX = {
    "causal_conv1d": ("four taps, bias, silu", "rows shorter than the taps, from a state"),
    "linear_attention": (
        "decay a head, past a chunk",
        "no decay, odd channels, heads shared",
        "packed with 64 bits, a token does not see itself",
        "decay a channel",
    ),
}
CALLS = [
    pytest.param(ALL_OPS[name], example, id=f"{name}-{example.name}")
    for name in pallas.__all__
    for example in examples_of(ALL_OPS[name])
    if example.name not in LEFT_TO_JAX.get(name, ())
]


@pytest.fixture(scope="module", autouse=True)
def _device():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PJRT_DEVICE", "CPU")
        yield


def on_xla(function):
    """Move the tensors of a call to an XLA device and its results back."""

    def moved(value):
        return value.to("xla") if isinstance(value, torch.Tensor) else value

    def call(*arguments, backend, **options):
        if backend == "torch":
            return function(*arguments, backend=backend, **options)
        options = {key: moved(value) for key, value in options.items()}
        result = function(*map(moved, arguments), backend=backend, **options)
        return tuple(each.cpu() for each in result) if isinstance(result, tuple) else result.cpu()

    return call


@pytest.mark.parametrize(("op", "example"), CALLS)
def test_values_and_gradients_match_float64(op, example):
    check_against_reference(
        on_xla(op.function),
        example.arguments,
        example.options,
        backend="pallas",
        dtype=torch.float32,
        where="cpu",
    )


@pytest.mark.parametrize("name", ["swiglu", "rmsnorm", "causal_conv1d"])
def test_bfloat16_matches_too(name):
    op = ALL_OPS[name]
    example = examples_of(op)[0]
    check_against_reference(
        on_xla(op.function),
        example.arguments,
        example.options,
        backend="pallas",
        dtype=torch.bfloat16,
        where="cpu",
    )


def test_it_runs_only_when_named_and_says_why_it_cannot():
    x = torch.randn(2, 4, device="xla")
    swiglu = ALL_OPS["swiglu"]
    assert swiglu.choose(None, x, x) is swiglu.reference
    assert swiglu.choose("pallas", x, x) is not swiglu.reference
    with pytest.raises(UnsupportedBackendError, match="float64 is not among float32 and bfloat16"):
        swiglu.function(x.double(), x.double(), backend="pallas")
    with pytest.raises(UnsupportedBackendError, match="runs on xla tensors, and these are on cpu"):
        swiglu.function(x.cpu(), x.cpu(), backend="pallas")
