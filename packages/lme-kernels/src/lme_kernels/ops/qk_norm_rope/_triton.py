"""Normalisation and rotation of heads in Triton: queries and keys in one launch."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lme_kernels._triton_heads import HeadLayout, angle_stride, head_strides
from lme_kernels._triton_rows import num_processors, sum_partials
from lme_kernels.custom_ops import define
from lme_kernels.device import why_not_triton as why_not
from lme_kernels.ops.qk_norm_rope._triton_kernels import backward_kernel, forward_kernel
from lme_kernels.tuning import next_power_of_two

__all__ = ["qk_norm_rope", "why_not"]


def qk_norm_rope(
    query: Tensor,
    key: Tensor,
    query_weight: Tensor | None,
    key_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    channels: str,
) -> tuple[Tensor, Tensor]:
    return _QKNormRope.apply(query, key, query_weight, key_weight, cos, sin, eps, channels)


class _QKNormRope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, query_weight, key_weight, cos, sin, eps, channels):
        ctx.save_for_backward(query, key, query_weight, key_weight, cos, sin)
        ctx.eps, ctx.channels = eps, channels
        return _forward(query, key, query_weight, key_weight, cos, sin, eps, channels)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_query, grad_key):
        query, key, query_weight, key_weight, cos, sin = ctx.saved_tensors
        grads = _backward(
            grad_query,
            grad_key,
            query,
            key,
            query_weight,
            key_weight,
            cos,
            sin,
            ctx.eps,
            ctx.channels,
        )
        return (
            grads[0],
            grads[1],
            None if query_weight is None else grads[2],
            None if key_weight is None else grads[3],
            *(None,) * 4,
        )


def _forward_fake(query, key, query_weight, key_weight, cos, sin, eps, channels):
    return query.new_empty(query.shape), key.new_empty(key.shape)


@define(
    "qk_norm_rope_forward(Tensor query, Tensor key, Tensor? query_weight, Tensor? key_weight, "
    "Tensor cos, Tensor sin, float eps, str channels) -> (Tensor, Tensor)",
    _forward_fake,
)
def _forward(query, key, query_weight, key_weight, cos, sin, eps, channels):
    query_to, key_to = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key))
    B, S, N, D = query.shape
    K, R = key.shape[2], cos.shape[-1]
    if B * S == 0 or D == 0:
        return query_to, key_to
    query, query_strides = head_strides(query)
    key, key_strides = head_strides(key)
    cos, sin = cos.contiguous(), sin.contiguous()
    layout = HeadLayout.of(R, D, channels)
    block_query_heads = layout.block_heads(N)
    forward_kernel[(B * S,)](
        query,
        key,
        query_weight,
        key_weight,
        cos,
        sin,
        query_to,
        key_to,
        *query_strides,
        *key_strides,
        angle_stride(cos),
        S,
        eps,
        HAS_QUERY_WEIGHT=query_weight is not None,
        HAS_KEY_WEIGHT=key_weight is not None,
        N=N,
        K=K,
        R=R,
        D=D,
        ROTATED=layout.rotated,
        PASSING=layout.passing,
        BLOCK_QUERY_HEADS=block_query_heads,
        BLOCK_KEY_HEADS=layout.block_heads(K),
        BLOCK_HALF=layout.block_half,
        BLOCK_PASSING=layout.block_passing,
        num_warps=max(1, min(8, block_query_heads * next_power_of_two(D) // 512)),
    )
    return query_to, key_to


def _backward_fake(
    grad_query, grad_key, query, key, query_weight, key_weight, cos, sin, eps, channels
):
    return (
        query.new_empty(query.shape),
        key.new_empty(key.shape),
        query.new_empty(0) if query_weight is None else torch.empty_like(query_weight),
        key.new_empty(0) if key_weight is None else torch.empty_like(key_weight),
    )


@define(
    "qk_norm_rope_backward(Tensor grad_query, Tensor grad_key, Tensor query, Tensor key, "
    "Tensor? query_weight, Tensor? key_weight, Tensor cos, Tensor sin, float eps, str channels) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _backward_fake,
)
def _backward(grad_query, grad_key, query, key, query_weight, key_weight, cos, sin, eps, channels):
    cos, sin = cos.contiguous(), sin.contiguous()
    grad_of_query, grad_of_query_weight = _backward_one(
        grad_query, query, query_weight, cos, sin, eps, channels
    )
    grad_of_key, grad_of_key_weight = _backward_one(
        grad_key, key, key_weight, cos, sin, eps, channels
    )
    return grad_of_query, grad_of_key, grad_of_query_weight, grad_of_key_weight


def _backward_one(grad, x, weight, cos, sin, eps, channels):
    """Gradients of queries or keys and of their weight."""
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    B, S, N, D = x.shape
    R = cos.shape[-1]
    if B * S == 0 or D == 0:
        return grad_x, x.new_empty(0) if weight is None else torch.zeros_like(weight)
    grad, grad_strides = head_strides(grad)
    x, x_strides = head_strides(x)
    layout = HeadLayout.of(R, D, channels)
    block_heads = layout.block_heads(N)
    num_warps = max(1, min(8, block_heads * next_power_of_two(D) // 512))
    programs = min(B * S, num_processors(x.device) * (16 // num_warps))
    num_partials = 0 if weight is None else programs
    partials = torch.empty((num_partials, D), dtype=torch.float32, device=x.device)
    backward_kernel[(programs,)](
        grad,
        x,
        weight,
        cos,
        sin,
        grad_x,
        partials,
        *grad_strides,
        *x_strides,
        angle_stride(cos),
        S,
        B * S,
        eps,
        HAS_WEIGHT=weight is not None,
        N=N,
        R=R,
        D=D,
        ROTATED=layout.rotated,
        PASSING=layout.passing,
        BLOCK_HEADS=block_heads,
        BLOCK_HALF=layout.block_half,
        BLOCK_PASSING=layout.block_passing,
        num_warps=num_warps,
    )
    if weight is None:
        return grad_x, x.new_empty(0)
    return grad_x, sum_partials(partials, weight.dtype)
