"""Histogram of integers in plain torch."""

import torch
from torch import Tensor


def continuous_count(x: Tensor, bins: int) -> Tensor:
    flat = x.reshape(-1).long()
    # One bin more for what is not counted; `torch.bincount` would read the largest value back.
    index = torch.where((flat >= 0) & (flat < bins), flat, bins)
    counts = torch.zeros(bins + 1, dtype=torch.int32, device=x.device)
    return counts.scatter_add(0, index, torch.ones_like(index, dtype=torch.int32))[:bins]
