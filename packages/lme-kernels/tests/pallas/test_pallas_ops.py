"""The jax functions against the torch reference on the example calls of each op."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from lme_kernels import pallas
from lme_kernels.examples import examples_of
from lme_kernels.functional import ALL_OPS
from lme_kernels.testing import assert_matches, run

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}
# Every call in float32, which compiles fastest; the first of each op in the other dtypes too.
CALLS = [
    pytest.param(name, example, dtype, id=f"{name}-{example.name}-{spelled}")
    for name in pallas.__all__
    for number, example in enumerate(examples_of(ALL_OPS[name]))
    for spelled, dtype in DTYPES.items()
    if number == 0 or dtype == torch.float32
]


@pytest.fixture(autouse=True)
def _float64():
    """float64 arrays, which jax leaves out unless asked."""
    with jax.enable_x64(True):
        yield


def to_jax(value):
    if not isinstance(value, torch.Tensor):
        return value
    # numpy has no bfloat16, and a copy keeps the array from changing with the tensor.
    wide = value.double() if value.dtype == torch.bfloat16 else value
    array = jnp.array(wide.detach().numpy())
    return array.astype(jnp.bfloat16) if value.dtype == torch.bfloat16 else array


def to_torch(array):
    dtype = vars(torch)[array.dtype.name]
    return torch.from_numpy(np.array(array.astype(jnp.float64))).to(dtype)


def rounded(value, dtype):
    floating = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.to(dtype) if floating else value


def in_torch(function, arguments, options, grads_dtype):
    """Outputs and gradients of all floating-point tensors, keywords among them."""
    names = [key for key, value in options.items() if is_floating(value)]

    def call(*tensors):
        keywords = {**options, **dict(zip(names, tensors[len(arguments) :], strict=True))}
        return function(*tensors[: len(arguments)], **keywords, backend="torch")

    tensors = [*arguments, *(options[key] for key in names)]
    return run(call, tensors, {}, weight_dtype=grads_dtype)


def is_floating(value):
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def in_jax(function, arguments, options):
    names = [key for key, value in options.items() if is_floating(value)]
    fixed = {key: to_jax(value) for key, value in options.items() if key not in names}
    positions = [i for i, value in enumerate(arguments) if is_floating(value)]

    def call(*arrays):
        values = list(arguments)
        for position, array in zip(positions, arrays, strict=False):
            values[position] = array
        keywords = dict(zip(names, arrays[len(positions) :], strict=True))
        return function(*values, **keywords, **fixed)

    @jax.jit
    def differentiate(arrays):
        outputs, pull = jax.vjp(call, *arrays)
        several = isinstance(outputs, tuple)
        outputs = outputs if several else (outputs,)
        weights = [to_jax(weight_like(index, each)) for index, each in enumerate(outputs)]
        return outputs, pull(tuple(weights) if several else weights[0])

    given = [arguments[i] for i in positions] + [options[key] for key in names]
    outputs, gradients = differentiate(list(map(to_jax, given)))
    return list(map(to_torch, outputs)), list(map(to_torch, gradients))


def weight_like(index, output):
    """What `lme_kernels.testing.run` multiplies an output with."""
    generator = torch.Generator().manual_seed(index)
    weight = torch.randn(output.shape, generator=generator, dtype=torch.float32)
    return weight.to(vars(torch)[output.dtype.name])


@pytest.mark.parametrize(("name", "example", "dtype"), CALLS)
def test_values_and_gradients_match_the_torch_reference(name, example, dtype):
    arguments = [rounded(each, dtype) for each in example.arguments]
    options = {key: rounded(value, dtype) for key, value in example.options.items()}
    wide = [rounded(each, torch.float64) for each in arguments]
    wide_options = {key: rounded(value, torch.float64) for key, value in options.items()}
    plain = in_torch(ALL_OPS[name].function, arguments, options, dtype)
    exact = in_torch(ALL_OPS[name].function, wide, wide_options, dtype)
    outputs, gradients = in_jax(vars(pallas)[name], arguments, options)
    for kind, ours, theirs, truth in (
        ("output", outputs, plain.outputs, exact.outputs),
        ("gradient", gradients, plain.gradients, exact.gradients),
    ):
        for index, three in enumerate(zip(ours, theirs, truth, strict=True)):
            assert_matches(*three, name=f"{kind} {index}")
