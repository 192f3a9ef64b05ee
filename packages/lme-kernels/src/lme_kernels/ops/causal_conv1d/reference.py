"""Depthwise causal convolution in plain torch."""

import torch
from torch import Tensor
from torch.nn import functional as F

from lme_kernels.packing import position_ids, sequence_ids
from lme_kernels.precision import compute_dtype


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
) -> Tensor:
    compute = compute_dtype(x.dtype)
    taps = weight.to(compute).unbind(-1)
    W = len(taps)
    inputs = x.to(compute)
    initial = None if initial_state is None else initial_state.to(compute).mT
    if cu_seqlens is None:
        if initial is None:
            initial = inputs.new_zeros((x.shape[0], W - 1, x.shape[2]))
        padded, S = torch.cat((initial, inputs), 1), x.shape[1]
        shifted = [padded[:, j : j + S] for j in range(W)]
    else:
        shifted = [_before(inputs, initial, cu_seqlens, W, W - 1 - j) for j in range(W)]
    y = taps[0] * shifted[0]
    for tap, each in zip(taps[1:], shifted[1:], strict=True):
        y = y + tap * each
    if bias is not None:
        y = y + bias.to(compute)
    return (F.silu(y) if silu else y).to(x.dtype)


def _before(x: Tensor, initial: Tensor | None, cu_seqlens: Tensor, W: int, distance: int) -> Tensor:
    """Take for each packed token the one `distance` before it, from the state before the first."""
    if distance == 0:
        return x
    position = position_ids(cu_seqlens, x.shape[0]).unsqueeze(-1)
    earlier = x.roll(distance, 0)
    if initial is None:
        return torch.where(position >= distance, earlier, 0.0)
    owner = sequence_ids(cu_seqlens, x.shape[0])
    column = (W - 1 + position.squeeze(-1) - distance).clamp(0, W - 2)
    return torch.where(position >= distance, earlier, initial[owner, column])


def last_inputs(
    x: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None, W: int
) -> Tensor:
    """Take the last W - 1 inputs of each sequence, those of the state before shorter ones.

    Args:
        x: Shape (B, S, C), or (T, C) if packed.
        initial_state: Shape (sequences, C, W - 1); `None` for zeros.
        cu_seqlens: Offsets of packed sequences.
        W: Width of the convolution.

    Returns:
        Shape (sequences, C, W - 1), dtype of `x`.
    """
    sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if initial_state is None:
        earlier = x.new_zeros((sequences, W - 1, x.shape[-1]))
    else:
        earlier = initial_state.to(x.dtype).mT
    if cu_seqlens is None:
        return torch.cat((earlier, x), 1)[:, x.shape[1] :].mT.contiguous()
    offsets = cu_seqlens.long()
    lengths = offsets.diff().unsqueeze(-1)
    column = torch.arange(W - 1, device=x.device)
    place = lengths - (W - 1) + column
    # The row of zeros keeps the index in range where there are no tokens.
    padded = torch.cat((x, x.new_zeros((1, x.shape[-1]))))
    recent = padded[(offsets[:-1, None] + place).clamp(min=0)]
    older = earlier.gather(
        1, (lengths + column).clamp(max=W - 2).unsqueeze(-1).expand(earlier.shape)
    )
    return torch.where(place.unsqueeze(-1) >= 0, recent, older).mT.contiguous()
