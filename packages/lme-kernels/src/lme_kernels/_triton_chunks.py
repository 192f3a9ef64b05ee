"""What Triton kernels of recurrences with a matrix for a state share: tiles of chunks, and slots.

Used by `linear_attention` and `mamba2_ssm`, and open to every op that walks chunks. A *slot* is the
place of a chunk among all chunks of a call: those of a sequence follow each other. Buffers with
something a chunk are indexed by slot, those of packed sequences with as many slots as there can be,
so that nothing is read from the device. Decays are kept as logarithms, summed from the start of each
chunk, and constant past its last token.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from lme_kernels.ops.linear_attention.chunks import chunk_table, first_chunks
from lme_kernels.tuning import ceil_div, next_power_of_two


@dataclass(frozen=True, slots=True)
class Slots:
    """The chunks of a call."""

    chunk: int
    """Tokens of a chunk."""
    sequences: int
    """Number of sequences."""
    S: int
    """Tokens of each sequence; all tokens if packed."""
    count: int
    """Number of slots."""
    cu_seqlens: Tensor | None
    """Offsets of packed sequences."""
    first: Tensor | None
    """First slot of each packed sequence, int64, shape (sequences + 1,)."""
    table: Tensor | None
    """What `chunk_table` says of packed sequences."""

    @classmethod
    def of(cls, x: Tensor, cu_seqlens: Tensor | None, chunk: int) -> "Slots":
        """Cut the tokens of `x`, shape (B, S, heads, channels), or (T, heads, channels) if packed.

        Args:
            x: An input.
            cu_seqlens: Offsets of packed sequences.
            chunk: Tokens of a chunk.
        """
        S = x.shape[-3]
        if cu_seqlens is None:
            return cls(chunk, x.shape[0], S, x.shape[0] * ceil_div(S, chunk), None, None, None)
        cu_seqlens = cu_seqlens.contiguous()
        table = chunk_table(cu_seqlens, S, chunk)
        first = first_chunks(cu_seqlens, chunk)
        sequences = cu_seqlens.shape[0] - 1
        return cls(chunk, sequences, S, table.shape[1] if S else 0, cu_seqlens, first, table)


def block_of(channels: int) -> int:
    """Power of two that covers `channels`, at least the 16 that tensor cores take."""
    return max(16, next_power_of_two(channels))


def shared_bytes(K: int) -> int:
    """Shared memory that a program takes at most on a GPU before Hopper, or without its units.

    Programs for Hopper take up to 220 KiB, which it has.

    Args:
        K: Channels of a key.
    """
    return (80 if block_of(K) <= 128 else 108) * 1024


def precision_of(dtype: torch.dtype) -> str:
    """How `tl.dot` multiplies numbers of `dtype`: float32 without rounding them first."""
    return "ieee" if dtype == torch.float32 else "tf32"


def as_tokens(x: Tensor) -> tuple[Tensor, int, int]:
    """Return `x`, or a copy if need be, and its strides between tokens and between heads.

    Args:
        x: Shape (B, S, heads, channels), or (T, heads, channels) if packed.
    """
    apart = x.ndim == 4 and x.shape[0] > 1 and x.stride(0) != x.shape[1] * x.stride(1)
    if x.stride(-1) != 1 or apart:
        x = x.contiguous()
    return x, x.stride(-3), x.stride(-2)


def sum_groups(grad: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    """Sum the gradients of the heads that shared one of `heads`, in float32.

    Args:
        grad: Shape (..., N, channels).
        heads: Number of heads of the input.
        dtype: Dtype of the input.

    Returns:
        Shape (..., heads, channels).
    """
    if grad.shape[-2] == heads:
        return grad.to(dtype)
    groups = grad.unflatten(-2, (heads, grad.shape[-2] // heads))
    return groups.sum(-2, dtype=torch.float32).to(dtype)


@triton.jit
def sequence_of(cu_ptr, first_ptr, sequence, S, C: tl.constexpr, PACKED: tl.constexpr):
    """First token, tokens and first slot of a sequence."""
    if PACKED:
        start = tl.load(cu_ptr + sequence).to(tl.int64)
        length = (tl.load(cu_ptr + sequence + 1).to(tl.int64) - start).to(tl.int32)
        base = tl.load(first_ptr + sequence).to(tl.int64)
    else:
        start = sequence.to(tl.int64) * S
        length = S
        base = sequence.to(tl.int64) * tl.cdiv(S, C)
    return start, length, base


@triton.jit
def slot_of(table_ptr, slot, count, S, C: tl.constexpr, PACKED: tl.constexpr):
    """First token of a slot and how many it has: none in one that is not used."""
    if PACKED:
        start = tl.load(table_ptr + count + slot)
        length = tl.load(table_ptr + 2 * count + slot).to(tl.int32)
    else:
        chunks = tl.cdiv(S, C)
        sequence = slot // chunks
        place = (slot - sequence * chunks) * C
        start = sequence.to(tl.int64) * S + place
        length = tl.minimum(S - place, C)
    return start, length


@triton.jit
def load_rows(
    ptr, start, length, stride, first, C: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr
):
    """Load tokens from `start` on as rows, channels from `first` on across, zeros outside."""
    row = tl.arange(0, C)
    channel = first + tl.arange(0, BLOCK)
    # Within a chunk offsets have 32 bits, and are the same for each.
    offset = row[:, None] * stride + channel[None, :]
    mask = (row < length)[:, None] & (channel < D)[None, :]
    return tl.load(ptr + start.to(tl.int64) * stride + offset, mask=mask, other=0.0)


@triton.jit
def load_columns(
    ptr, start, length, stride, first, C: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr
):
    """Load tokens from `start` on as columns, channels from `first` on down, zeros outside."""
    column = tl.arange(0, C)
    channel = first + tl.arange(0, BLOCK)
    offset = column[None, :] * stride + channel[:, None]
    mask = (column < length)[None, :] & (channel < D)[:, None]
    return tl.load(ptr + start.to(tl.int64) * stride + offset, mask=mask, other=0.0)


@triton.jit
def store_rows(
    ptr, tile, start, length, stride, first, C: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr
):
    """Store what `load_rows` loads."""
    row = tl.arange(0, C)
    channel = first + tl.arange(0, BLOCK)
    offset = row[:, None] * stride + channel[None, :]
    mask = (row < length)[:, None] & (channel < D)[None, :]
    tl.store(ptr + start.to(tl.int64) * stride + offset, tile, mask=mask)


@triton.jit
def load_state(
    ptr,
    index,
    first_key,
    first_value,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Load a block of matrix `index` of those behind `ptr`, zeros outside."""
    row = first_key + tl.arange(0, BLOCK_K)[:, None]
    column = first_value + tl.arange(0, BLOCK_V)[None, :]
    matrix = ptr + index.to(tl.int64) * (K * V)
    return tl.load(matrix + row * V + column, mask=(row < K) & (column < V), other=0.0)


@triton.jit
def store_state(
    ptr,
    state,
    index,
    first_key,
    first_value,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Store what `load_state` loads."""
    row = first_key + tl.arange(0, BLOCK_K)[:, None]
    column = first_value + tl.arange(0, BLOCK_V)[None, :]
    matrix = ptr + index.to(tl.int64) * (K * V)
    tl.store(matrix + row * V + column, state, mask=(row < K) & (column < V))
