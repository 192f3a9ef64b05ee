"""Rotary position embedding in plain torch."""

import torch
from torch import Tensor

from lme_kernels.precision import compute_dtype


def rope(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, channels: str
) -> tuple[Tensor, Tensor]:
    return rotate(query, cos, sin, channels), rotate(key, cos, sin, channels)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, channels: str) -> Tensor:
    """Rotate one tensor of shape (B, S, heads, D); angles are constants to the gradient."""
    compute = compute_dtype(x.dtype)
    R, D = cos.shape[-1], x.shape[-1]
    start = D - R if channels == "last" else 0
    rotating = x[..., start : start + R].to(compute)
    first, second = rotating.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    cos, sin = (each.detach().to(compute).unsqueeze(-2) for each in (cos, sin))
    rotated = (rotating * cos + turned * sin).to(x.dtype)
    if R == D:
        return rotated
    return torch.cat((x[..., :start], rotated, x[..., start + R :]), dim=-1)
