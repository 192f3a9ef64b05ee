"""Normalisation by the p-norm in plain torch."""

import torch
from torch import Tensor

from lme_kernels.precision import compute_dtype


def p_norm(x: Tensor, weight: Tensor | None, p: float, eps: float) -> Tensor:
    x_compute = x.to(compute_dtype(x.dtype))
    norm = torch.linalg.vector_norm(x_compute, ord=p, dim=-1, keepdim=True)
    y = x_compute / norm.clamp(min=eps)
    return (y if weight is None else y * weight.to(y.dtype)).to(x.dtype)
