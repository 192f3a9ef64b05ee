"""Histogram of integers in Triton, by atomic additions of integers: exact in any order."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lme_kernels._triton_launch import thin_launch
from lme_kernels.custom_ops import define
from lme_kernels.tuning import next_power_of_two

# Integers a program counts, and the most bins that it compares each of them with.
BLOCK = 512
MAX_COMPARED = 512
BLOCK_BINS = 32


def continuous_count(x: Tensor, bins: int) -> Tensor:
    return _forward(x, bins)


@thin_launch
@triton.jit(do_not_specialize=["size"])
def _compare_kernel(x_ptr, counts_ptr, size, bins, BLOCK: tl.constexpr, BLOCK_BINS: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + index, mask=index < size, other=-1)
    for first in range(0, bins, BLOCK_BINS):
        bin_of = first + tl.arange(0, BLOCK_BINS)
        count = tl.sum((x[:, None] == bin_of[None, :]).to(tl.int32), axis=0)
        # One addition a program and bin, where one a number would queue at the few addresses.
        tl.atomic_add(counts_ptr + bin_of, count, mask=(bin_of < bins) & (count > 0))


@thin_launch
@triton.jit(do_not_specialize=["size"])
def _add_kernel(x_ptr, counts_ptr, size, bins, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + index, mask=index < size, other=-1)
    one = tl.full((BLOCK,), 1, tl.int32)
    tl.atomic_add(counts_ptr + x, one, mask=(x >= 0) & (x < bins))


def _fake(x, bins):
    return x.new_empty(bins, dtype=torch.int32)


@define("continuous_count_forward(Tensor x, SymInt bins) -> Tensor", _fake)
def _forward(x, bins):
    counts = torch.zeros(bins, dtype=torch.int32, device=x.device)
    size = x.numel()
    if size == 0:
        return counts
    x = x.contiguous()
    grid = (triton.cdiv(size, BLOCK),)
    if bins <= MAX_COMPARED:
        block_bins = min(BLOCK_BINS, next_power_of_two(bins))
        _compare_kernel[grid](x, counts, size, bins, BLOCK=BLOCK, BLOCK_BINS=block_bins)
    else:
        _add_kernel[grid](x, counts, size, bins, BLOCK=BLOCK)
    return counts
