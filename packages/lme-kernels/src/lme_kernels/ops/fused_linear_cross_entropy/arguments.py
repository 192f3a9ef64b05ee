"""Checks of the arguments that all losses of a linear layer take."""

import torch
from torch import Tensor


def check_linear(x: Tensor, weight: Tensor, labels: Tensor | None) -> None:
    """Check shapes and dtypes.

    Raises:
        ValueError: If `x` (T, H), `weight` (V, H) and `labels` (T,) do not fit.
    """
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(
            f"`x` and `weight` must have shapes (T, H) and (V, H), got {tuple(x.shape)} and "
            f"{tuple(weight.shape)}"
        )
    if x.dtype != weight.dtype:
        raise ValueError(f"`weight` must have the dtype {x.dtype} of `x`, got {weight.dtype}")
    if labels is not None and labels.shape != x.shape[:1]:
        expected, got = tuple(x.shape[:1]), tuple(labels.shape)
        raise ValueError(f"`labels` must have shape {expected} to match `x`, got {got}")


def sum_dtype(weight: Tensor, grad_accum_dtype: torch.dtype | None) -> torch.dtype:
    """Dtype in which the gradient of `weight` is summed: asked for, and no less than its own."""
    if grad_accum_dtype is None:
        return weight.dtype
    return torch.promote_types(grad_accum_dtype, weight.dtype)
