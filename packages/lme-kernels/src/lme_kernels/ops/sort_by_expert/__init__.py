"""Order of the entries of tokens by expert."""

import torch
from torch import Tensor

from lme_kernels.op import Backend, Op
from lme_kernels.ops.sort_by_expert import reference

SORT_BY_EXPERT = Op(
    name="sort_by_expert",
    reference=reference.sort_by_expert,
    implementations={
        Backend.TRITON: "lme_kernels.ops.sort_by_expert._triton",
        Backend.CUDA: "lme_kernels.ops.sort_by_expert._cuda",
    },
)


def sort_by_expert(
    indices: Tensor, num_experts: int, *, backend: Backend | str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Sort entries by their expert, those of one expert in the order they came in.

    Args:
        indices: Expert of each entry, any shape, int32 or int64, from 0 to num_experts - 1
            (checked on no device: one outside counts as the nearest expert). Entries are numbered
            along the flattened tensor, so that entry i of indices of shape (T, k) belongs to token
            i // k.
        num_experts: Number of experts E.
        backend: Implementation to run; `None` takes the fastest one proven for `indices`' device.

    Returns:
        Three int32 tensors: the entries in sorted order, shape (T * k,); the end of each expert's
        entries in that order, shape (E,); and the place of each entry in it, shape (T * k,), the
        inverse of the first. Nothing waits for the device.

    Raises:
        ValueError: If `indices` is not int32 or int64, or `num_experts` is less than 1.
        UnsupportedBackendError: If `backend` is named and cannot serve the call.

    Source: counting sort; `torch.sort(stable=True)`.
    """
    if indices.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"`indices` must be int32 or int64, got {indices.dtype}")
    if num_experts < 1:
        raise ValueError(f"`num_experts` must be at least 1, got {num_experts}")
    return SORT_BY_EXPERT.choose(backend, indices)(indices, num_experts)
