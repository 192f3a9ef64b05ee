"""Jax functions called with torch tensors on XLA devices, and differentiated by torch.

A call becomes a program of XLA once for each function, options and shapes; torch_xla then puts it
into its own program. The backward is a program of its own that runs what it needs of the forward
again, so that a call keeps its arguments and nothing else.
"""

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import torch
import torch_xla.core.xla_builder as xla_builder
from jax import Array
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch_xla import runtime

DTYPES: Mapping[torch.dtype, jnp.dtype] = {
    torch.float32: jnp.dtype("float32"),
    torch.bfloat16: jnp.dtype(jnp.bfloat16),
    torch.int32: jnp.dtype("int32"),
}


def why_not(*tensors: Tensor | None) -> str | None:
    """Say why the Pallas kernels cannot take `tensors`, which are on an XLA device.

    Args:
        tensors: The floating-point arguments of a call; `None` stands for one left out.

    Returns:
        The reason in words, or `None` if they can.
    """
    if runtime.device_type() not in ("TPU", "CPU"):
        return f"it runs on TPUs, and torch_xla drives a device of type {runtime.device_type()}"
    for tensor in tensors:
        if tensor is not None and tensor.dtype not in (torch.float32, torch.bfloat16):
            return f"{tensor.dtype} is not among float32 and bfloat16"
    return None


def call(
    function: Callable[..., Any], tensors: Mapping[str, Tensor | None], **options: object
) -> tuple[Tensor, ...]:
    """Call a function of `lme_kernels.pallas`.

    The kernels are interpreted where torch_xla drives a CPU, which is for tests.

    Args:
        function: The function.
        tensors: Its array arguments by name; `None` for one left out. Integers are taken as int32.
        options: Its other arguments, which can be hashed.

    Returns:
        What it returns, as a tuple.
    """
    given = {
        name: each if each.is_floating_point() else each.to(torch.int32)
        for name, each in tensors.items()
        if each is not None
    }
    platform = runtime.device_type().lower()
    keywords = (*options.items(), ("interpret", platform != "tpu"))
    signature = _Signature(
        function,
        tuple(given),
        tuple((tuple(each.shape), DTYPES[each.dtype]) for each in given.values()),
        keywords,
        platform,
    )
    return _Call.apply(signature, *given.values())


class _Signature(NamedTuple):
    """What a program depends on."""

    function: Callable[..., Any]
    names: tuple[str, ...]
    """Names of the array arguments that are given."""
    arrays: tuple[tuple[tuple[int, ...], jnp.dtype], ...]
    """Their shapes and dtypes."""
    options: tuple[tuple[str, object], ...]
    platform: str
    """Of XLA: "tpu" or "cpu"."""

    def run(self, *arrays: Array) -> tuple[Array, ...]:
        named = dict(zip(self.names, arrays, strict=True))
        result = self.function(**named, **dict(self.options))
        return result if isinstance(result, tuple) else (result,)

    def is_floating(self) -> list[bool]:
        return [jnp.issubdtype(dtype, jnp.floating) for _, dtype in self.arrays]

    def pull(self, *arrays_and_grads: Array) -> tuple[Array, ...]:
        """Return the gradients of the floating-point arguments, from all and those of outputs."""
        arrays = list(arrays_and_grads[: len(self.arrays)])
        grads = arrays_and_grads[len(self.arrays) :]
        floating = [i for i, each in enumerate(self.is_floating()) if each]

        def of_floating(*values: Array) -> tuple[Array, ...]:
            everything = list(arrays)
            for position, value in zip(floating, values, strict=True):
                everything[position] = value
            return self.run(*everything)

        return jax.vjp(of_floating, *(arrays[i] for i in floating))[1](grads)


@lru_cache(maxsize=1024)
def _program(signature: _Signature, backward: bool) -> Callable[[list[Tensor]], list[Tensor]]:
    arrays = [jax.ShapeDtypeStruct(*each) for each in signature.arrays]
    function = signature.run
    if backward:
        arrays += jax.eval_shape(signature.run, *arrays)
        function = signature.pull
    traced = jax.jit(function, keep_unused=True).trace(*arrays)
    lowered = traced.lower(lowering_platforms=(signature.platform,))
    # What jax gives for XLA's own format has no type.
    module: Any = lowered.compiler_ir("hlo")
    name = f"lme_kernels_{signature.function.__name__}_{'backward' if backward else 'forward'}"
    computation = xla_builder.computation_from_module_proto(
        name, module.as_serialized_hlo_module_proto()
    )
    return xla_builder.xla_computation_as_func(computation, name)


class _Call(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, signature: _Signature, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.signature = signature
        ctx.save_for_backward(*tensors)
        return tuple(_program(signature, False)(list(tensors)))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gradients = iter(_program(ctx.signature, True)([*ctx.saved_tensors, *grads]))
        return None, *(next(gradients) if each else None for each in ctx.signature.is_floating())
