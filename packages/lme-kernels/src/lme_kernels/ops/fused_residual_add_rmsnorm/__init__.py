"""Residual addition and the normalisation that follows it, in one pass."""

from torch import Tensor

from lme_kernels.op import Backend, Op
from lme_kernels.ops.fused_residual_add_rmsnorm import reference

FUSED_RESIDUAL_ADD_RMSNORM = Op(
    name="fused_residual_add_rmsnorm",
    reference=reference.fused_residual_add_rmsnorm,
    implementations={Backend.TRITON: "lme_kernels.ops.fused_residual_add_rmsnorm._triton"},
)


def fused_residual_add_rmsnorm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    *,
    eps: float = 1e-6,
    scale: float = 1.0,
    backend: Backend | str | None = None,
) -> tuple[Tensor, Tensor]:
    """Add a block's output to the residual stream and normalise the sum.

    Args:
        x: Output of a block, shape (..., hidden).
        residual: Residual stream, shape and dtype of `x`.
        weight: Scale of the normalisation, shape (hidden,); `None` for no scale.
        eps: Added to the mean square, in units of `x` squared.
        scale: Factor of `x` in the sum.
        backend: Implementation to run; `None` takes the fastest one proven for `x`'s device.

    Returns:
        `y` and `new_residual`, both of the shape and dtype of `x`: `new_residual` is
        `residual + scale * x`, and `y` is `new_residual` after rounding, divided by its root mean
        square and multiplied by `weight`, in at least float32.

    Raises:
        ValueError: If `residual` or `weight` does not fit `x`.
        UnsupportedBackendError: If `backend` is named and cannot serve the call.

    Source: Zhang and Sennrich 2019, equation 4 (arXiv:1910.07467), after the residual sum of a
    pre-norm block.
    """
    if residual.shape != x.shape or residual.dtype != x.dtype:
        raise ValueError(
            f"`residual` must have the shape {tuple(x.shape)} and dtype {x.dtype} of `x`, got "
            f"{tuple(residual.shape)} and {residual.dtype}"
        )
    if weight is not None and weight.shape != x.shape[-1:]:
        expected, got = tuple(x.shape[-1:]), tuple(weight.shape)
        raise ValueError(f"`weight` must have shape {expected} to match `x`, got {got}")
    function = FUSED_RESIDUAL_ADD_RMSNORM.choose(backend, x, residual, weight)
    return function(x, residual, weight, eps, scale)
