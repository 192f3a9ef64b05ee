"""The dtype that reductions and sums are taken in."""

import torch


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype to compute in for tensors of `dtype`: at least float32.

    float64 stays float64, so that a proof in float64 means something.
    """
    return torch.promote_types(dtype, torch.float32)
