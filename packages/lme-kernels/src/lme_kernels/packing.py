"""Cumulative lengths of packed sequences: made from lengths, and read as ids and positions."""

import torch
from torch import Tensor


def cu_seqlens_from_lengths(lengths: Tensor) -> Tensor:
    """Add lengths up to the offsets that the ops on packed sequences take.

    Args:
        lengths: Tokens of each sequence, shape (sequences,), an integer dtype; zeros are allowed.

    Returns:
        Shape (sequences + 1,), int32, from 0 to the number of tokens; sequence i has the tokens
        from entry i up to entry i + 1.

    Raises:
        ValueError: If `lengths` is not one-dimensional.
    """
    if lengths.ndim != 1:
        raise ValueError(f"`lengths` must have one dimension, got shape {tuple(lengths.shape)}")
    ends = lengths.cumsum(0, dtype=torch.int32)
    return torch.cat((ends.new_zeros(1), ends))


def sequence_ids(cu_seqlens: Tensor, total_tokens: int) -> Tensor:
    """Say which sequence each packed token belongs to.

    Args:
        cu_seqlens: Offsets, shape (sequences + 1,), int32 or int64.
        total_tokens: Number of packed tokens; not read from `cu_seqlens`, since that would wait
            for the device.

    Returns:
        Shape (total_tokens,), int64. Tokens past the last sequence get the number of sequences.
    """
    tokens = torch.arange(total_tokens, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens.long(), tokens, right=True) - 1


def position_ids(cu_seqlens: Tensor, total_tokens: int) -> Tensor:
    """Give the position of each packed token in its sequence.

    Args:
        cu_seqlens: Offsets, shape (sequences + 1,), int32 or int64.
        total_tokens: Number of packed tokens.

    Returns:
        Shape (total_tokens,), int64, from 0 in each sequence. Tokens past the last sequence are
        counted from its end.
    """
    tokens = torch.arange(total_tokens, device=cu_seqlens.device)
    return tokens - cu_seqlens.long()[sequence_ids(cu_seqlens, total_tokens)]


def check_cu_seqlens(cu_seqlens: Tensor, sequences: int | None) -> None:
    """Check the shape and dtype of offsets; their values are on the device and stay unread.

    Args:
        cu_seqlens: Offsets as a caller gave them.
        sequences: Number of sequences there must be; `None` for any.

    Raises:
        ValueError: If they are not integers of shape (sequences + 1,).
    """
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(
            f"`cu_seqlens` must have shape (sequences + 1,), got {tuple(cu_seqlens.shape)}"
        )
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"`cu_seqlens` must be int32 or int64, got {cu_seqlens.dtype}")
    if sequences is not None and cu_seqlens.shape[0] != sequences + 1:
        raise ValueError(
            f"`cu_seqlens` must have {sequences + 1} entries for {sequences} sequences, got "
            f"{cu_seqlens.shape[0]}"
        )


def check_padding_side(padding_side: str) -> None:
    """Check the name of the side that pads are on.

    Args:
        padding_side: As a caller gave it.

    Raises:
        ValueError: If there is no such side.
    """
    if padding_side not in ("left", "right"):
        raise ValueError(f'`padding_side` must be "left" or "right", got {padding_side!r}')
