"""Residual addition and root mean square normalisation in plain torch."""

from torch import Tensor

from lme_kernels.ops.rmsnorm.reference import rmsnorm
from lme_kernels.precision import compute_dtype


def fused_residual_add_rmsnorm(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, scale: float
) -> tuple[Tensor, Tensor]:
    compute = compute_dtype(x.dtype)
    new_residual = (residual.to(compute) + scale * x.to(compute)).to(x.dtype)
    # The rounded sum is normalised: it is what the backward finds again.
    return rmsnorm(new_residual, weight, eps), new_residual
