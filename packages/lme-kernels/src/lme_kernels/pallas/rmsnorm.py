"""Root mean square normalisation in Pallas."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, Ref
from jax.experimental import pallas as pl

from lme_kernels.pallas.blocks import compute_dtype, resolve_interpret, rows_of_block


def rmsnorm(
    x: Array, weight: Array | None, *, eps: float = 1e-6, interpret: bool | None = None
) -> Array:
    """Divide each row of `x` by its root mean square, then scale it.

    Args:
        x: Activations, shape (..., hidden).
        weight: Scale, shape (hidden,); `None` for no scale.
        eps: Added to the mean square, in units of `x` squared.
        interpret: Whether to run the kernel as plain jax operations; `None` does so unless a TPU is
            there.

    Returns:
        Shape (..., hidden), dtype of `x`. Computed in at least float32 and rounded once, after the
        scale.

    Raises:
        ValueError: If `weight` does not have shape (hidden,).

    Source: Zhang and Sennrich 2019, equation 4 (arXiv:1910.07467).
    """
    if weight is not None and weight.shape != x.shape[-1:]:
        raise ValueError(
            f"`weight` must have shape {x.shape[-1:]} to match `x`, got {weight.shape}"
        )
    if x.size == 0:
        return x
    H = x.shape[-1]
    scale = jnp.ones((1, H), compute_dtype(x.dtype)) if weight is None else weight.reshape(1, H)
    return _rmsnorm(x.reshape(-1, H), scale, eps, resolve_interpret(interpret)).reshape(x.shape)


def _rmsnorm_primal(x: Array, weight: Array, eps: float, interpret: bool) -> Array:
    rows, whole, block = _specs(x, 2)
    return pl.pallas_call(
        partial(_forward_kernel, eps=eps),
        grid=(pl.cdiv(x.shape[0], block),),
        in_specs=[rows, whole],
        out_specs=rows,
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        interpret=interpret,
    )(x, weight)


def _rmsnorm_forward(
    x: Array, weight: Array, eps: float, interpret: bool
) -> tuple[Array, tuple[Array, Array]]:
    return _rmsnorm_primal(x, weight, eps, interpret), (x, weight)


def _rmsnorm_backward(
    eps: float, interpret: bool, saved: tuple[Array, Array], grad_y: Array
) -> tuple[Array, Array]:
    x, weight = saved
    rows, whole, block = _specs(x, 3)
    grad_x, grad_weight = pl.pallas_call(
        partial(_backward_kernel, eps=eps, num_rows=x.shape[0]),
        grid=(pl.cdiv(x.shape[0], block),),
        in_specs=[rows, whole, rows],
        out_specs=[rows, whole],
        out_shape=[
            jax.ShapeDtypeStruct(x.shape, x.dtype),
            jax.ShapeDtypeStruct(weight.shape, compute_dtype(x.dtype)),
        ],
        interpret=interpret,
    )(x, weight, grad_y)
    return grad_x, grad_weight.astype(weight.dtype)


_rmsnorm = jax.custom_vjp(_rmsnorm_primal, nondiff_argnums=(2, 3))
_rmsnorm.defvjp(_rmsnorm_forward, _rmsnorm_backward)


def _specs(x: Array, num_arrays: int) -> tuple[pl.BlockSpec, pl.BlockSpec, int]:
    H = x.shape[1]
    # What is computed on the way takes the space of two more arrays.
    block = rows_of_block(x, num_arrays + 1)
    return (
        pl.BlockSpec((block, H), lambda i: (i, 0)),
        pl.BlockSpec((1, H), lambda i: (0, 0)),
        block,
    )


def _forward_kernel(x_ref: Ref, weight_ref: Ref, y_ref: Ref, *, eps: float) -> None:
    compute = compute_dtype(x_ref.dtype)
    x = x_ref[...].astype(compute)
    y = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)
    y_ref[...] = (y * weight_ref[...].astype(compute)).astype(y_ref.dtype)


def _backward_kernel(
    x_ref: Ref,
    weight_ref: Ref,
    grad_y_ref: Ref,
    grad_x_ref: Ref,
    grad_weight_ref: Ref,
    *,
    eps: float,
    num_rows: int,
) -> None:
    compute = compute_dtype(x_ref.dtype)
    x, grad_y = x_ref[...].astype(compute), grad_y_ref[...].astype(compute)
    block = pl.program_id(0)
    row = block * x.shape[0] + jax.lax.broadcasted_iota(jnp.int32, (x.shape[0], 1), 0)
    # The last block may reach past the last row, where anything may stand.
    x, grad_y = (jnp.where(row < num_rows, each, 0.0) for each in (x, grad_y))
    inverse_rms = jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)
    normal = x * inverse_rms
    grad_normal = grad_y * weight_ref[...].astype(compute)
    projection = jnp.mean(grad_normal * normal, axis=-1, keepdims=True)
    grad_x_ref[...] = (inverse_rms * (grad_normal - normal * projection)).astype(grad_x_ref.dtype)

    @pl.when(block == 0)
    def _() -> None:
        grad_weight_ref[...] = jnp.zeros(grad_weight_ref.shape, compute)

    # Blocks follow each other on one core, so that the sum may stay on chip.
    grad_weight_ref[...] += jnp.sum(grad_y * normal, axis=0, keepdims=True)
