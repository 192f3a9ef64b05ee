"""Histogram of integers in CUDA C++, by atomic additions of integers: exact in any order."""

import torch
from torch import Tensor

from lme_kernels.cuda_driver import kernel
from lme_kernels.custom_ops import define
from lme_kernels.tuning import ceil_div

FILE = "ops/continuous_count/_cuda.cu"
INTEGERS = {torch.int32: "int", torch.int64: "long long"}
THREADS = 256
# Integers a thread, at least, and blocks at most: each adds its bins to those of all.
PER_THREAD = 8
MAX_BLOCKS = 1024
# What every block may have without asking.
SHARED_BYTES = 48 * 1024


def continuous_count(x: Tensor, bins: int) -> Tensor:
    return _forward(x, bins)


def _fake(x: Tensor, bins: int) -> Tensor:
    return x.new_empty(bins, dtype=torch.int32)


@define("continuous_count_cuda_forward(Tensor x, SymInt bins) -> Tensor", _fake)
def _forward(x: Tensor, bins: int) -> Tensor:
    counts = torch.zeros(bins, dtype=torch.int32, device=x.device)
    size = x.numel()
    if size == 0:
        return counts
    x = x.contiguous()
    pointer = x.data_ptr()
    shared_bytes = bins * 4
    fits = shared_bytes <= SHARED_BYTES
    launch = kernel(
        FILE,
        "count_shared" if fits else "count_global",
        "PPqii",
        (f"INTEGER={INTEGERS[x.dtype]}",),
        x.get_device(),
    )
    launch(
        min(MAX_BLOCKS, ceil_div(size, THREADS * PER_THREAD)),
        (THREADS, 1),
        pointer,
        counts.data_ptr(),
        size,
        bins,
        pointer % 16 == 0,
        shared_bytes=shared_bytes if fits else 0,
    )
    return counts
