"""Layer normalisation in plain torch."""

import torch
from torch import Tensor

from lme_kernels.precision import compute_dtype


def layernorm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    x_compute = x.to(compute_dtype(x.dtype))
    centred = x_compute - x_compute.mean(dim=-1, keepdim=True)
    y = centred * torch.rsqrt(centred.square().mean(dim=-1, keepdim=True) + eps)
    if weight is not None:
        y = y * weight.to(y.dtype)
    if bias is not None:
        y = y + bias.to(y.dtype)
    return y.to(x.dtype)
