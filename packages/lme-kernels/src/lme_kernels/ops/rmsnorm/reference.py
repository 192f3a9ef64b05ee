"""Root mean square normalisation in plain torch."""

import torch
from torch import Tensor

from lme_kernels.precision import compute_dtype


def rmsnorm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    x_compute = x.to(compute_dtype(x.dtype))
    y = x_compute * torch.rsqrt(x_compute.square().mean(dim=-1, keepdim=True) + eps)
    # Round once, after the scale: rounding before it too would add a second error.
    return (y if weight is None else y * weight.to(y.dtype)).to(x.dtype)
