"""Padded sequences to packed tokens in plain torch."""

import torch
from torch import Tensor

from lme_kernels.packing import sequence_ids


def pack_sequence(x: Tensor, cu_seqlens: Tensor, total_tokens: int, padding_side: str) -> Tensor:
    B, S = x.shape[:2]
    flat = x.flatten(0, 1)
    if flat.shape[0] == 0:
        # Nothing to index, and the result still depends on `x`.
        return x.new_zeros((total_tokens, *x.shape[2:])) + flat.sum(0).to(x.dtype)
    offsets = cu_seqlens.long()
    ids = sequence_ids(offsets, total_tokens)
    exists = ids < B
    ids = ids.clamp(max=B - 1)
    column = torch.arange(total_tokens, device=x.device) - offsets[ids]
    if padding_side == "left":
        column = column + S - (offsets[ids + 1] - offsets[ids])
    # Offsets that do not fit are a caller's error that only the device could see: no token of
    # another row is taken for them.
    exists = exists & (column >= 0) & (column < S)
    taken = flat[torch.where(exists, ids * S + column, 0)]
    exists = exists.reshape(-1, *(1,) * (taken.ndim - 1))
    return torch.where(exists, taken, torch.zeros((), dtype=x.dtype, device=x.device))
