"""Padded sequences to packed tokens."""

from collections.abc import Sequence
from typing import Literal, overload

from torch import Tensor

from lme_kernels.op import Backend, Op
from lme_kernels.ops.pack_sequence import reference
from lme_kernels.packing import check_cu_seqlens, check_padding_side

PACK_SEQUENCE = Op(
    name="pack_sequence",
    reference=reference.pack_sequence,
    implementations={
        Backend.CUDA: "lme_kernels.ops.pack_sequence._cuda",
        Backend.TRITON: "lme_kernels.ops.pack_sequence._triton",
    },
)

PaddingSide = Literal["left", "right"]


@overload
def pack_sequence(
    x: Tensor,
    cu_seqlens: Tensor,
    *,
    total_tokens: int | None = None,
    padding_side: PaddingSide = "left",
    backend: Backend | str | None = None,
) -> Tensor: ...
@overload
def pack_sequence(
    x: Sequence[Tensor],
    cu_seqlens: Tensor,
    *,
    total_tokens: int | None = None,
    padding_side: PaddingSide = "left",
    backend: Backend | str | None = None,
) -> list[Tensor]: ...
def pack_sequence(
    x: Tensor | Sequence[Tensor],
    cu_seqlens: Tensor,
    *,
    total_tokens: int | None = None,
    padding_side: PaddingSide = "left",
    backend: Backend | str | None = None,
) -> Tensor | list[Tensor]:
    """Drop the pads of a batch: its tokens one sequence after the other.

    Args:
        x: Padded tokens, shape (B, S, ...), any dtype; or several such tensors.
        cu_seqlens: Offsets of the sequences among the packed tokens, shape (B + 1,), int32 or
            int64, from 0; no sequence is longer than S, and empty ones are allowed.
        total_tokens: Number of packed tokens T, at least the last of `cu_seqlens`; tokens past it
            are zero. `None` reads it from `cu_seqlens`, which waits for the device and cannot be
            compiled or captured in a graph.
        padding_side: Side of the pads: "left" takes the last tokens of each row, "right" the
            first.
        backend: Implementation to run; `None` takes the fastest one proven for `x`'s device.

    Returns:
        Shape (T, ...), dtype of `x`, the same bits; a list for several tensors.

    Raises:
        ValueError: If `cu_seqlens` does not have B + 1 integers, or there is no such side.
        UnsupportedBackendError: If `backend` is named and cannot serve the call.

    Source: padding-free training of decoder models; the inverse of `unpack_sequence`.
    """
    check_padding_side(padding_side)
    if total_tokens is None:
        check_cu_seqlens(cu_seqlens, None)
        total_tokens = int(cu_seqlens[-1])
    if isinstance(x, Tensor):
        return _pack(x, cu_seqlens, total_tokens, padding_side, backend)
    return [_pack(each, cu_seqlens, total_tokens, padding_side, backend) for each in x]


def _pack(
    x: Tensor, cu_seqlens: Tensor, total_tokens: int, padding_side: str, backend: str | None
) -> Tensor:
    if x.ndim < 2:
        raise ValueError(f"`x` must have shape (B, S, ...), got {tuple(x.shape)}")
    check_cu_seqlens(cu_seqlens, x.shape[0])
    function = PACK_SEQUENCE.choose(backend, x, cu_seqlens)
    return function(x, cu_seqlens, total_tokens, padding_side)
