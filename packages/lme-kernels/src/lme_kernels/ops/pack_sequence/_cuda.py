"""Padded sequences to packed tokens in CUDA C++."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lme_kernels._cuda_packing import pack, unpack, why_not

__all__ = ["pack_sequence", "why_not"]


def pack_sequence(x: Tensor, cu_seqlens: Tensor, total_tokens: int, padding_side: str) -> Tensor:
    return _PackSequence.apply(x, cu_seqlens, total_tokens, padding_side == "left")


class _PackSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cu_seqlens: Tensor, total_tokens: int, left: bool) -> Tensor:
        ctx.save_for_backward(cu_seqlens)
        ctx.max_seqlen, ctx.left = x.shape[1], left
        return pack(x, cu_seqlens, total_tokens, left)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (cu_seqlens,) = ctx.saved_tensors
        return unpack(grad_y, cu_seqlens, ctx.max_seqlen, ctx.left, 0), None, None, None
