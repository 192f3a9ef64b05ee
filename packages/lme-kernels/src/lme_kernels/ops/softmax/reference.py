"""Softmax in plain torch."""

import torch
from torch import Tensor

from lme_kernels.precision import compute_dtype


def softmax(x: Tensor, scale: float, softcap: float | None) -> Tensor:
    scores = x.to(compute_dtype(x.dtype)) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return torch.softmax(scores, dim=-1).to(x.dtype)
