"""Packed tokens to padded sequences in plain torch."""

import torch
from torch import Tensor


def unpack_sequence(
    x: Tensor, cu_seqlens: Tensor, max_seqlen: int, padding_side: str, pad_value: float
) -> Tensor:
    if x.shape[0] == 0:
        # A token that no sequence has, so that there is something to index.
        x = torch.cat((x, x.new_zeros((1, *x.shape[1:]))))
    offsets = cu_seqlens.long()
    starts, lengths = offsets[:-1, None], offsets.diff()[:, None]
    column = torch.arange(max_seqlen, device=x.device)[None, :]
    if padding_side == "left":
        column = column - (max_seqlen - lengths)
    token = starts + column
    exists = (column >= 0) & (column < lengths) & (token < x.shape[0])
    taken = x[torch.where(exists, token, 0)]
    exists = exists.reshape(*exists.shape, *(1,) * (x.ndim - 1))
    return torch.where(exists, taken, torch.full((), pad_value, dtype=x.dtype, device=x.device))
