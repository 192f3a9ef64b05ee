"""Packed tokens to padded sequences in CUDA C++."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lme_kernels._cuda_packing import pack, unpack, why_not

__all__ = ["unpack_sequence", "why_not"]


def unpack_sequence(
    x: Tensor, cu_seqlens: Tensor, max_seqlen: int, padding_side: str, pad_value: float
) -> Tensor:
    return _UnpackSequence.apply(x, cu_seqlens, max_seqlen, padding_side == "left", pad_value)


class _UnpackSequence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        left: bool,
        pad_value: float,
    ) -> Tensor:
        ctx.save_for_backward(cu_seqlens)
        ctx.tokens, ctx.left = x.shape[0], left
        return unpack(x, cu_seqlens, max_seqlen, left, pad_value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (cu_seqlens,) = ctx.saved_tensors
        return pack(grad_y, cu_seqlens, ctx.tokens, ctx.left), None, None, None, None
