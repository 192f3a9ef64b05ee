"""Counting sort by expert in Triton: counts of blocks, their running sum, ranks within blocks."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lme_kernels._triton_launch import thin_launch
from lme_kernels.custom_ops import define
from lme_kernels.tuning import next_power_of_two

# Entries a program ranks by comparing each with each.
BLOCK = 128
BLOCK_EXPERTS = 32


def sort_by_expert(indices: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    return _forward(indices, num_experts)


@triton.jit
def _load_experts(indices_ptr, index, size, num_experts):
    expert = tl.load(indices_ptr + index, mask=index < size, other=0).to(tl.int32)
    expert = tl.minimum(tl.maximum(expert, 0), num_experts - 1)
    return tl.where(index < size, expert, num_experts)


@thin_launch
@triton.jit(do_not_specialize=["size", "blocks"])
def _count_kernel(
    indices_ptr,
    counts_ptr,
    size,
    num_experts,
    blocks,
    BLOCK: tl.constexpr,
    BLOCK_EXPERTS: tl.constexpr,
):
    block = tl.program_id(0)
    index = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    expert = _load_experts(indices_ptr, index, size, num_experts)
    for first in range(0, num_experts, BLOCK_EXPERTS):
        each = first + tl.arange(0, BLOCK_EXPERTS)
        count = tl.sum((expert[:, None] == each[None, :]).to(tl.int32), axis=0)
        tl.store(counts_ptr + each.to(tl.int64) * blocks + block, count, mask=each < num_experts)


@thin_launch
@triton.jit(do_not_specialize=["size", "blocks"])
def _place_kernel(
    indices_ptr,
    counts_ptr,
    ends_ptr,
    order_ptr,
    position_ptr,
    size,
    num_experts,
    blocks,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    index = block.to(tl.int64) * BLOCK + lane
    inside = index < size
    expert = _load_experts(indices_ptr, index, size, num_experts)
    # The same entries along the other axis of the comparison.
    other_index = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    other = _load_experts(indices_ptr, other_index, size, num_experts)
    before = tl.arange(0, BLOCK)[None, :] < lane[:, None]
    rank = tl.sum((before & (other[None, :] == expert[:, None])).to(tl.int32), axis=1)
    cell = expert.to(tl.int64) * blocks + block
    end = tl.load(ends_ptr + cell, mask=inside, other=0)
    position = end - tl.load(counts_ptr + cell, mask=inside, other=0) + rank
    tl.store(position_ptr + index, position, mask=inside)
    tl.store(order_ptr + position, index.to(tl.int32), mask=inside)


def _fake(indices, num_experts):
    size = indices.numel()
    return tuple(indices.new_empty(each, dtype=torch.int32) for each in (size, num_experts, size))


@define(
    "sort_by_expert_forward(Tensor indices, SymInt num_experts) -> (Tensor, Tensor, Tensor)", _fake
)
def _forward(indices, num_experts):
    size = indices.numel()
    options = {"dtype": torch.int32, "device": indices.device}
    order, position = (torch.empty(size, **options) for _ in range(2))
    if size == 0:
        return order, torch.zeros(num_experts, **options), position
    indices = indices.contiguous()
    blocks = triton.cdiv(size, BLOCK)
    # By expert and then by block, so that a running sum gives the ends of both.
    counts = torch.empty((num_experts, blocks), **options)
    block_experts = min(BLOCK_EXPERTS, next_power_of_two(num_experts))
    _count_kernel[(blocks,)](
        indices, counts, size, num_experts, blocks, BLOCK=BLOCK, BLOCK_EXPERTS=block_experts
    )
    ends = counts.view(-1).cumsum(0, dtype=torch.int32).view(num_experts, blocks)
    _place_kernel[(blocks,)](
        indices, counts, ends, order, position, size, num_experts, blocks, BLOCK=BLOCK
    )
    return order, ends[:, -1].contiguous(), position
