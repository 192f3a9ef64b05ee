"""Normalisation of heads and rotary embedding in plain torch."""

from torch import Tensor

from lme_kernels.ops.rmsnorm.reference import rmsnorm
from lme_kernels.ops.rope.reference import rotate
from lme_kernels.precision import compute_dtype


def qk_norm_rope(
    query: Tensor,
    key: Tensor,
    query_weight: Tensor | None,
    key_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    channels: str,
) -> tuple[Tensor, Tensor]:
    compute = compute_dtype(query.dtype)
    normed_query = rmsnorm(query.to(compute), query_weight, eps)
    normed_key = rmsnorm(key.to(compute), key_weight, eps)
    return (
        rotate(normed_query, cos, sin, channels).to(query.dtype),
        rotate(normed_key, cos, sin, channels).to(key.dtype),
    )
