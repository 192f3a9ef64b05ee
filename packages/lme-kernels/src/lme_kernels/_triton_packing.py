"""Packed and padded tokens in Triton: one kernel each way, each the other's backward."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lme_kernels._triton_launch import thin_launch
from lme_kernels.custom_ops import define
from lme_kernels.strides import has_whole_rows
from lme_kernels.tuning import next_power_of_two

# Elements a program copies: 16 bytes a thread and load, four times, in bfloat16.
ELEMENTS = 8192
SERVED = frozenset(
    {
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
    }
)


def why_not(x: Tensor, cu_seqlens: Tensor) -> str | None:
    """Say why the kernels cannot copy `x`."""
    if x.dtype not in SERVED:
        return f"it does not copy {x.dtype}"
    if cu_seqlens.device != x.device:
        return f"`cu_seqlens` is on {cu_seqlens.device} and `x` on {x.device}"
    return None


@thin_launch
@triton.jit(do_not_specialize=["tokens", "sequences"])
def _pack_kernel(
    x_ptr,
    cu_seqlens_ptr,
    y_ptr,
    batch_stride,
    token_stride,
    tokens,
    sequences,
    max_seqlen,
    width,
    LEFT: tl.constexpr,
    BLOCK_SEQUENCES: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    # The sequence of a token is the number of ends at or before it: offsets are read in one go,
    # where a binary search would wait for memory at every step.
    sequence = tl.zeros((BLOCK_TOKENS,), dtype=tl.int32)
    for first in range(0, sequences, BLOCK_SEQUENCES):
        index = first + tl.arange(0, BLOCK_SEQUENCES)
        ends = tl.load(cu_seqlens_ptr + 1 + index, mask=index < sequences, other=0).to(tl.int64)
        passed = (ends[None, :] <= token[:, None]) & (index < sequences)[None, :]
        sequence += tl.sum(passed.to(tl.int32), axis=1)
    exists = (token < tokens) & (sequence < sequences)
    start = tl.load(cu_seqlens_ptr + sequence, mask=exists, other=0).to(tl.int64)
    place = token - start
    if LEFT:
        end = tl.load(cu_seqlens_ptr + 1 + sequence, mask=exists, other=0).to(tl.int64)
        place += max_seqlen - (end - start)
    exists &= (place >= 0) & (place < max_seqlen)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    source = x_ptr + sequence.to(tl.int64)[:, None] * batch_stride + place[:, None] * token_stride
    inside = (column < width)[None, :]
    values = tl.load(source + column[None, :], mask=exists[:, None] & inside, other=0)
    target = y_ptr + token[:, None] * width + column[None, :]
    tl.store(target, values, mask=(token < tokens)[:, None] & inside)


@thin_launch
@triton.jit(do_not_specialize=["rows", "tokens", "pad_value"])
def _unpack_kernel(
    x_ptr,
    cu_seqlens_ptr,
    y_ptr,
    token_stride,
    rows,
    tokens,
    max_seqlen,
    width,
    pad_value,
    LEFT: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    sequence = row // max_seqlen
    place = row % max_seqlen
    start = tl.load(cu_seqlens_ptr + sequence, mask=row < rows, other=0).to(tl.int64)
    end = tl.load(cu_seqlens_ptr + 1 + sequence, mask=row < rows, other=0).to(tl.int64)
    if LEFT:
        place -= max_seqlen - (end - start)
    token = start + place
    exists = (row < rows) & (place >= 0) & (token < end) & (token < tokens)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (column < width)[None, :]
    source = x_ptr + token[:, None] * token_stride + column[None, :]
    values = tl.load(source, mask=exists[:, None] & inside, other=0)
    values = tl.where(exists[:, None], values, pad_value)
    target = y_ptr + row[:, None] * width + column[None, :]
    tl.store(target, values, mask=(row < rows)[:, None] & inside)


def _shape(rows, width):
    block = min(ELEMENTS, max(16, next_power_of_two(width)))
    block_rows = min(ELEMENTS // block, 128, next_power_of_two(rows))
    num_warps = max(1, min(8, block_rows * block // 1024))
    return (triton.cdiv(rows, block_rows), triton.cdiv(width, block)), block_rows, block, num_warps


def _as_bytes(x):
    return x.view(torch.uint8) if x.dtype == torch.bool else x


def _pack_fake(x, cu_seqlens, total_tokens, left):
    return x.new_empty((total_tokens, *x.shape[2:]))


@define(
    "pack_sequence_forward(Tensor x, Tensor cu_seqlens, SymInt total_tokens, bool left) -> Tensor",
    _pack_fake,
)
def pack(x, cu_seqlens, total_tokens, left):
    """Launch the kernel: shape (B, S, ...) to (total_tokens, ...)."""
    y = torch.empty((total_tokens, *x.shape[2:]), dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    if x.numel() == 0:
        return y.zero_()
    if not has_whole_rows(x, 2):
        x = x.contiguous()
    width = y.numel() // total_tokens
    grid, block_tokens, block, num_warps = _shape(total_tokens, width)
    _pack_kernel[grid](
        _as_bytes(x),
        cu_seqlens.contiguous(),
        _as_bytes(y),
        x.stride(0),
        x.stride(1),
        total_tokens,
        x.shape[0],
        x.shape[1],
        width,
        LEFT=left,
        BLOCK_SEQUENCES=min(256, max(16, next_power_of_two(x.shape[0]))),
        BLOCK_TOKENS=block_tokens,
        BLOCK=block,
        num_warps=num_warps,
    )
    return y


def _unpack_fake(x, cu_seqlens, max_seqlen, left, pad_value):
    return x.new_empty((cu_seqlens.shape[0] - 1, max_seqlen, *x.shape[1:]))


@define(
    "unpack_sequence_forward(Tensor x, Tensor cu_seqlens, SymInt max_seqlen, bool left, "
    "Scalar pad_value) -> Tensor",
    _unpack_fake,
)
def unpack(x, cu_seqlens, max_seqlen, left, pad_value):
    """Launch the kernel: shape (T, ...) to (B, max_seqlen, ...), pads included."""
    rows = (cu_seqlens.shape[0] - 1) * max_seqlen
    shape = (cu_seqlens.shape[0] - 1, max_seqlen, *x.shape[1:])
    y = torch.empty(shape, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    if x.numel() == 0:
        return y.fill_(pad_value)
    if not has_whole_rows(x, 1):
        x = x.contiguous()
    width = y.numel() // rows
    grid, block_tokens, block, num_warps = _shape(rows, width)
    _unpack_kernel[grid](
        _as_bytes(x),
        cu_seqlens.contiguous(),
        _as_bytes(y),
        x.stride(0),
        rows,
        x.shape[0],
        max_seqlen,
        width,
        float(pad_value) if x.is_floating_point() else int(pad_value),
        LEFT=left,
        BLOCK_TOKENS=block_tokens,
        BLOCK=block,
        num_warps=num_warps,
    )
    return y
