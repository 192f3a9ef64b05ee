"""Histogram of integers."""

import torch
from torch import Tensor

from lme_kernels.op import Backend, Op
from lme_kernels.ops.continuous_count import reference

CONTINUOUS_COUNT = Op(
    name="continuous_count",
    reference=reference.continuous_count,
    implementations={
        Backend.TRITON: "lme_kernels.ops.continuous_count._triton",
        Backend.CUDA: "lme_kernels.ops.continuous_count._cuda",
    },
)


def continuous_count(x: Tensor, bins: int, *, backend: Backend | str | None = None) -> Tensor:
    """Count how often each of the integers below `bins` occurs: the load of experts.

    Args:
        x: Integers, any shape, int32 or int64; those outside 0 to bins - 1 are not counted.
        bins: Number of bins, at least 1.
        backend: Implementation to run; `None` takes the fastest one proven for `x`'s device.

    Returns:
        Shape (bins,), int32. Unlike `torch.bincount` on a GPU, nothing waits for the device.

    Raises:
        ValueError: If `x` is not int32 or int64, or `bins` is less than 1.
        UnsupportedBackendError: If `backend` is named and cannot serve the call.

    Source: `torch.bincount`.
    """
    if x.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"`x` must be int32 or int64, got {x.dtype}")
    if bins < 1:
        raise ValueError(f"`bins` must be at least 1, got {bins}")
    return CONTINUOUS_COUNT.choose(backend, x)(x, bins)
