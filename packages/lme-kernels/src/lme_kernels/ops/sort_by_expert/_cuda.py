"""Counting sort by expert in CUDA C++: counts of blocks, then places by ranks within warps."""

import torch
from torch import Tensor

from lme_kernels.cuda_driver import kernel
from lme_kernels.custom_ops import define
from lme_kernels.tuning import ceil_div

FILE = "ops/sort_by_expert/_cuda.cu"
INTEGERS = {torch.int32: "int", torch.int64: "long long"}
THREADS = 256
# Numbers an expert that a block keeps while it places: two, and one for each of its warps.
NUMBERS = 10
# What every block may have without asking, less what the kernel has besides.
SHARED_BYTES = 47 * 1024


def sort_by_expert(indices: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    return _forward(indices, num_experts)


def _span(size: int, in_shared: bool) -> int:
    """Entries of a block, a multiple of its threads."""
    # Every block reads the counts of all: few blocks, but enough to fill a GPU.
    blocks = max(min(128, ceil_div(size, 1024)), min(512, size // 16384))
    if not in_shared:
        blocks = min(blocks, 64)
    return ceil_div(ceil_div(size, blocks), THREADS) * THREADS


def _fake(indices: Tensor, num_experts: int) -> tuple[Tensor, ...]:
    size = indices.numel()
    return tuple(indices.new_empty(each, dtype=torch.int32) for each in (size, num_experts, size))


@define(
    "sort_by_expert_cuda_forward(Tensor indices, SymInt num_experts) -> (Tensor, Tensor, Tensor)",
    _fake,
)
def _forward(indices: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    size = indices.numel()
    options = {"dtype": torch.int32, "device": indices.device}
    order, position = (torch.empty(size, **options) for _ in range(2))
    if size == 0:
        return order, torch.zeros(num_experts, **options), position
    indices = indices.contiguous()
    ends = torch.empty(num_experts, **options)
    shared_bytes = NUMBERS * num_experts * 4
    in_shared = shared_bytes <= SHARED_BYTES
    span = _span(size, in_shared)
    blocks = ceil_div(size, span)
    counts = torch.empty(blocks * num_experts, **options)
    memory = counts if in_shared else torch.empty(blocks * NUMBERS * num_experts, **options)
    where = "shared" if in_shared else "global"
    source = ((f"INTEGER={INTEGERS[indices.dtype]}",), indices.get_device())
    count = kernel(FILE, f"count_{where}", "PPqqi", *source)
    place = kernel(FILE, f"place_{where}", "PPPPPPqqi", *source)
    pointer, block = indices.data_ptr(), (THREADS, 1)
    count(
        blocks,
        block,
        pointer,
        counts.data_ptr(),
        size,
        span,
        num_experts,
        shared_bytes=4 * num_experts if in_shared else 0,
    )
    results = (each.data_ptr() for each in (counts, memory, ends, order, position))
    place(
        blocks,
        block,
        pointer,
        *results,
        size,
        span,
        num_experts,
        shared_bytes=shared_bytes if in_shared else 0,
    )
    return order, ends, position
