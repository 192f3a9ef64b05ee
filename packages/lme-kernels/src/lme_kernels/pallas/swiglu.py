"""Gated linear unit with SiLU in Pallas."""

from collections.abc import Callable

import jax
from jax import Array, Ref
from jax.experimental import pallas as pl

from lme_kernels.pallas.blocks import LANES, block_of, compute_dtype, resolve_interpret, sublanes


def swiglu(gate: Array, up: Array, *, interpret: bool | None = None) -> Array:
    """Multiply `up` by an activation of `gate`: `silu(gate) * up`.

    Args:
        gate: Input of the activation, any shape.
        up: Factor, shape and dtype of `gate`.
        interpret: Whether to run the kernel as plain jax operations; `None` does so unless a TPU is
            there.

    Returns:
        Shape and dtype of `gate`; computed in at least float32 and rounded once.

    Raises:
        ValueError: If `up` does not have the shape and dtype of `gate`.

    Source: Shazeer 2020, equation 6 (arXiv:2002.05202).
    """
    if up.shape != gate.shape or up.dtype != gate.dtype:
        raise ValueError(
            f"`up` must have the shape {gate.shape} and dtype {gate.dtype} of `gate`, got "
            f"{up.shape} and {up.dtype}"
        )
    if gate.size == 0:
        return gate
    rows = (-1, gate.shape[-1]) if gate.ndim else (1, 1)
    y = _swiglu(gate.reshape(rows), up.reshape(rows), resolve_interpret(interpret))
    return y.reshape(gate.shape)


def _swiglu_primal(gate: Array, up: Array, interpret: bool) -> Array:
    return _launch(_forward_kernel, (gate, up), 1, interpret)[0]


def _swiglu_forward(gate: Array, up: Array, interpret: bool) -> tuple[Array, tuple[Array, Array]]:
    return _swiglu_primal(gate, up, interpret), (gate, up)


def _swiglu_backward(
    interpret: bool, saved: tuple[Array, Array], grad_y: Array
) -> tuple[Array, Array]:
    grad_gate, grad_up = _launch(_backward_kernel, (*saved, grad_y), 2, interpret)
    return grad_gate, grad_up


_swiglu = jax.custom_vjp(_swiglu_primal, nondiff_argnums=(2,))
_swiglu.defvjp(_swiglu_forward, _swiglu_backward)


def _launch(
    kernel: Callable[..., None], inputs: tuple[Array, ...], num_outputs: int, interpret: bool
) -> list[Array]:
    M, H = inputs[0].shape
    # Up to six arrays in blocks of half a MiB, each of them twice.
    block = (block_of(M, 256, sublanes(inputs[0].dtype)), block_of(H, 512, LANES))
    spec = pl.BlockSpec(block, lambda i, j: (i, j))
    return pl.pallas_call(
        kernel,
        grid=(pl.cdiv(M, block[0]), pl.cdiv(H, block[1])),
        in_specs=[spec] * len(inputs),
        out_specs=[spec] * num_outputs,
        out_shape=[jax.ShapeDtypeStruct((M, H), inputs[0].dtype)] * num_outputs,
        interpret=interpret,
    )(*inputs)


def _forward_kernel(gate_ref: Ref, up_ref: Ref, y_ref: Ref) -> None:
    compute = compute_dtype(gate_ref.dtype)
    gate, up = gate_ref[...].astype(compute), up_ref[...].astype(compute)
    y_ref[...] = (gate * jax.nn.sigmoid(gate) * up).astype(y_ref.dtype)


def _backward_kernel(
    gate_ref: Ref, up_ref: Ref, grad_y_ref: Ref, grad_gate_ref: Ref, grad_up_ref: Ref
) -> None:
    compute = compute_dtype(gate_ref.dtype)
    gate, up, grad_y = (each[...].astype(compute) for each in (gate_ref, up_ref, grad_y_ref))
    sigmoid = jax.nn.sigmoid(gate)
    slope = sigmoid * (1.0 + gate * (1.0 - sigmoid))
    grad_gate_ref[...] = (grad_y * up * slope).astype(grad_gate_ref.dtype)
    grad_up_ref[...] = (grad_y * gate * sigmoid).astype(grad_up_ref.dtype)
