"""Packed tokens to padded sequences."""

from collections.abc import Sequence
from typing import Literal, overload

from torch import Tensor

from lme_kernels.op import Backend, Op
from lme_kernels.ops.unpack_sequence import reference
from lme_kernels.packing import check_cu_seqlens, check_padding_side

UNPACK_SEQUENCE = Op(
    name="unpack_sequence",
    reference=reference.unpack_sequence,
    implementations={
        Backend.CUDA: "lme_kernels.ops.unpack_sequence._cuda",
        Backend.TRITON: "lme_kernels.ops.unpack_sequence._triton",
    },
)

PaddingSide = Literal["left", "right"]


@overload
def unpack_sequence(
    x: Tensor,
    cu_seqlens: Tensor,
    *,
    batch_size: int,
    max_seqlen: int,
    padding_side: PaddingSide = "left",
    pad_value: float = 0,
    backend: Backend | str | None = None,
) -> Tensor: ...
@overload
def unpack_sequence(
    x: Sequence[Tensor],
    cu_seqlens: Tensor,
    *,
    batch_size: int,
    max_seqlen: int,
    padding_side: PaddingSide = "left",
    pad_value: float = 0,
    backend: Backend | str | None = None,
) -> list[Tensor]: ...
def unpack_sequence(
    x: Tensor | Sequence[Tensor],
    cu_seqlens: Tensor,
    *,
    batch_size: int,
    max_seqlen: int,
    padding_side: PaddingSide = "left",
    pad_value: float = 0,
    backend: Backend | str | None = None,
) -> Tensor | list[Tensor]:
    """Put packed tokens into rows of one length, with pads where a sequence is shorter.

    Args:
        x: Packed tokens, shape (T, ...), any dtype; or several such tensors.
        cu_seqlens: Offsets of the sequences among the packed tokens, shape (batch_size + 1,), int32
            or int64, from 0; empty sequences are allowed.
        batch_size: Number of sequences B.
        max_seqlen: Length of a row S, at least that of the longest sequence.
        padding_side: Side that the pads go to.
        pad_value: What a pad holds; a fraction has at most the precision of float32.
        backend: Implementation to run; `None` takes the fastest one proven for `x`'s device.

    Returns:
        Shape (B, S, ...), dtype of `x`, the same bits; a list for several tensors.

    Raises:
        ValueError: If `cu_seqlens` does not have `batch_size` + 1 integers, or there is no such
            side.
        UnsupportedBackendError: If `backend` is named and cannot serve the call.

    Source: padding-free training of decoder models; the inverse of `pack_sequence`.
    """
    check_padding_side(padding_side)
    check_cu_seqlens(cu_seqlens, batch_size)
    tensors = [x] if isinstance(x, Tensor) else x
    results = []
    for each in tensors:
        function = UNPACK_SEQUENCE.choose(backend, each, cu_seqlens)
        results.append(function(each, cu_seqlens, max_seqlen, padding_side, pad_value))
    return results[0] if isinstance(x, Tensor) else results
