"""Gated root mean square normalisation in plain torch."""

from torch import Tensor
from torch.nn import functional as F

from lme_kernels.ops.rmsnorm.reference import rmsnorm
from lme_kernels.precision import compute_dtype


def gated_rmsnorm(
    x: Tensor, gate: Tensor, weight: Tensor | None, eps: float, norm_before_gate: bool
) -> Tensor:
    compute = compute_dtype(x.dtype)
    opening = F.silu(gate.to(compute))
    if norm_before_gate:
        return (rmsnorm(x.to(compute), weight, eps) * opening).to(x.dtype)
    return rmsnorm(x.to(compute) * opening, weight, eps).to(x.dtype)
