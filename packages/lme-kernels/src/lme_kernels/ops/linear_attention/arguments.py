"""Checks of what the recurrences with a matrix for a state are given."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from lme_kernels.packing import check_cu_seqlens


class ChunkOptions(NamedTuple):
    """Options of a chunked recurrence, in the order its implementations take them."""

    scale: float
    chunk_size: int
    inclusive: bool = True

    def check(self) -> "ChunkOptions":
        """Return itself if every option is in range.

        Raises:
            ValueError: If one is not.
        """
        if self.chunk_size < 1:
            raise ValueError(f"`chunk_size` must be at least 1, got {self.chunk_size}")
        return self


def check_tokens(inputs: Mapping[str, Tensor], cu_seqlens: Tensor | None) -> None:
    """Check that inputs have the same tokens, dtype and number of dimensions.

    Args:
        inputs: Tensors by name, shape (B, S, heads, channels), or (T, heads, channels) with
            `cu_seqlens`.
        cu_seqlens: Offsets of packed sequences.

    Raises:
        ValueError: If they do not.
    """
    leading, tokens = (2, "(B, S,") if cu_seqlens is None else (1, "(T,")
    name, first = next(iter(inputs.items()))
    for each, tensor in inputs.items():
        if tensor.ndim != leading + 2 or tensor.shape[:leading] != first.shape[:leading]:
            raise ValueError(
                f"`{each}` must have shape {tokens} heads, channels) with the tokens of `{name}`, "
                f"got {tuple(tensor.shape)}; `cu_seqlens` goes with packed tokens and nothing else"
            )
        if tensor.dtype != first.dtype or not tensor.is_floating_point():
            raise ValueError(
                f"`{each}` must have the floating-point dtype of `{name}`, got {tensor.dtype} and "
                f"{first.dtype}"
            )
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, None)


def check_heads(counts: Mapping[str, int]) -> int:
    """Return the largest number of heads, which every other must divide.

    Raises:
        ValueError: If one does not.
    """
    N = max(counts.values())
    for name, count in counts.items():
        if count == 0 or N % count:
            raise ValueError(f"`{name}` has {count} heads, which do not divide the largest, {N}")
    return N


def check_shape(name: str, tensor: Tensor | None, shapes: list[tuple[int, ...]]) -> None:
    """Check that a tensor is floating-point and has one of some shapes.

    Raises:
        ValueError: If it does not.
    """
    if tensor is None:
        return
    if tuple(tensor.shape) not in shapes:
        wanted = " or ".join(str(each) for each in shapes)
        raise ValueError(f"`{name}` must have shape {wanted}, got {tuple(tensor.shape)}")
    if not tensor.is_floating_point():
        raise ValueError(f"`{name}` must be floating-point, got {tensor.dtype}")


def num_sequences(x: Tensor, cu_seqlens: Tensor | None) -> int:
    """Count the sequences of inputs of shape (B, S, ...), or (T, ...) with `cu_seqlens`."""
    return x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def final_dtype(x: Tensor, initial_state: Tensor | None) -> torch.dtype:
    """Return the dtype of the final state."""
    return x.dtype if initial_state is None else initial_state.dtype
