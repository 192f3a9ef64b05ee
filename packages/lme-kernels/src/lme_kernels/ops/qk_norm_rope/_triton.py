"""Normalisation and rotation of heads in Triton: queries and keys in one launch."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from lme_kernels._triton_heads import HeadLayout, angle_stride, head_strides, load_angles, rotate
from lme_kernels._triton_rows import num_processors, sum_partials
from lme_kernels.custom_ops import define
from lme_kernels.device import why_not_triton as why_not

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


@triton.jit
def _load_parts(
    x_ptr,
    head,
    head_stride,
    heads,
    R: tl.constexpr,
    D: tl.constexpr,
    ROTATED: tl.constexpr,
    PASSING: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_PASSING: tl.constexpr,
):
    """Load the two rotating halves of heads and the channels that pass, in float32."""
    half = tl.arange(0, BLOCK_HALF)[None, :]
    channel = tl.arange(0, BLOCK_PASSING)[None, :]
    start = x_ptr + head * head_stride
    rotating = (head < heads) & (half < R // 2)
    first = tl.load(start + ROTATED + half, mask=rotating, other=0.0).to(tl.float32)
    second = tl.load(start + ROTATED + R // 2 + half, mask=rotating, other=0.0).to(tl.float32)
    staying = (head < heads) & (channel < D - R)
    passing = tl.load(start + PASSING + channel, mask=staying, other=0.0).to(tl.float32)
    return first, second, passing


@triton.jit
def _store_parts(
    y_ptr,
    head,
    heads,
    first,
    second,
    passing,
    R: tl.constexpr,
    D: tl.constexpr,
    ROTATED: tl.constexpr,
    PASSING: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_PASSING: tl.constexpr,
):
    half = tl.arange(0, BLOCK_HALF)[None, :]
    channel = tl.arange(0, BLOCK_PASSING)[None, :]
    start = y_ptr + head * D
    rotating = (head < heads) & (half < R // 2)
    tl.store(start + ROTATED + half, first, mask=rotating)
    tl.store(start + ROTATED + R // 2 + half, second, mask=rotating)
    staying = (head < heads) & (channel < D - R)
    tl.store(start + PASSING + channel, passing, mask=staying)


@triton.jit
def _dot(first_a, second_a, passing_a, first_b, second_b, passing_b):
    """Inner products of heads held in parts, shape (heads, 1)."""
    total = tl.sum(first_a * first_b + second_a * second_b, axis=1, keep_dims=True)
    return total + tl.sum(passing_a * passing_b, axis=1, keep_dims=True)


@triton.jit
def _forward_heads(
    x_ptr,
    weight_ptr,
    y_ptr,
    head_stride,
    heads,
    cos_1,
    cos_2,
    sin_1,
    sin_2,
    eps,
    HAS_WEIGHT: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    ROTATED: tl.constexpr,
    PASSING: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_PASSING: tl.constexpr,
):
    """Normalise and rotate all heads of one token."""
    if HAS_WEIGHT:
        weight_1, weight_2, weight_3 = _load_parts(
            weight_ptr,
            tl.zeros((1, 1), tl.int32),
            0,
            1,
            R,
            D,
            ROTATED,
            PASSING,
            BLOCK_HALF,
            BLOCK_PASSING,
        )
    for first_head in range(0, heads, BLOCK_HEADS):
        head = first_head + tl.arange(0, BLOCK_HEADS)[:, None]
        first, second, passing = _load_parts(
            x_ptr, head, head_stride, heads, R, D, ROTATED, PASSING, BLOCK_HALF, BLOCK_PASSING
        )
        square = _dot(first, second, passing, first, second, passing) / D
        inverse_rms = tl.rsqrt(square + eps)
        first *= inverse_rms
        second *= inverse_rms
        passing *= inverse_rms
        if HAS_WEIGHT:
            first *= weight_1
            second *= weight_2
            passing *= weight_3
        first, second = rotate(first, second, cos_1, cos_2, sin_1, sin_2, False)
        _store_parts(
            y_ptr,
            head,
            heads,
            first,
            second,
            passing,
            R,
            D,
            ROTATED,
            PASSING,
            BLOCK_HALF,
            BLOCK_PASSING,
        )


@triton.jit(do_not_specialize=["S"])
def _forward_kernel(
    query_ptr,
    key_ptr,
    query_weight_ptr,
    key_weight_ptr,
    cos_ptr,
    sin_ptr,
    query_to_ptr,
    key_to_ptr,
    query_batch_stride,
    query_token_stride,
    query_head_stride,
    key_batch_stride,
    key_token_stride,
    key_head_stride,
    angle_stride,
    S,
    eps,
    HAS_QUERY_WEIGHT: tl.constexpr,
    HAS_KEY_WEIGHT: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    ROTATED: tl.constexpr,
    PASSING: tl.constexpr,
    BLOCK_QUERY_HEADS: tl.constexpr,
    BLOCK_KEY_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_PASSING: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    batch, position = token // S, token % S
    cos_1, cos_2, sin_1, sin_2 = load_angles(
        cos_ptr, sin_ptr, token, S, angle_stride, R, BLOCK_HALF
    )
    _forward_heads(
        query_ptr + batch * query_batch_stride + position * query_token_stride,
        query_weight_ptr,
        query_to_ptr + token * (N * D),
        query_head_stride,
        N,
        cos_1,
        cos_2,
        sin_1,
        sin_2,
        eps,
        HAS_QUERY_WEIGHT,
        R,
        D,
        ROTATED,
        PASSING,
        BLOCK_QUERY_HEADS,
        BLOCK_HALF,
        BLOCK_PASSING,
    )
    _forward_heads(
        key_ptr + batch * key_batch_stride + position * key_token_stride,
        key_weight_ptr,
        key_to_ptr + token * (K * D),
        key_head_stride,
        K,
        cos_1,
        cos_2,
        sin_1,
        sin_2,
        eps,
        HAS_KEY_WEIGHT,
        R,
        D,
        ROTATED,
        PASSING,
        BLOCK_KEY_HEADS,
        BLOCK_HALF,
        BLOCK_PASSING,
    )


@triton.jit(do_not_specialize=["S", "tokens"])
def _backward_kernel(
    grad_ptr,
    x_ptr,
    weight_ptr,
    cos_ptr,
    sin_ptr,
    grad_x_ptr,
    partial_ptr,
    grad_batch_stride,
    grad_token_stride,
    grad_head_stride,
    x_batch_stride,
    x_token_stride,
    x_head_stride,
    angle_stride,
    S,
    tokens,
    eps,
    HAS_WEIGHT: tl.constexpr,
    N: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    ROTATED: tl.constexpr,
    PASSING: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_PASSING: tl.constexpr,
):
    none = tl.zeros((1, 1), tl.int32)
    if HAS_WEIGHT:
        weight_1, weight_2, weight_3 = _load_parts(
            weight_ptr, none, 0, 1, R, D, ROTATED, PASSING, BLOCK_HALF, BLOCK_PASSING
        )
        grad_weight_1 = tl.zeros((BLOCK_HEADS, BLOCK_HALF), dtype=tl.float32)
        grad_weight_2 = tl.zeros((BLOCK_HEADS, BLOCK_HALF), dtype=tl.float32)
        grad_weight_3 = tl.zeros((BLOCK_HEADS, BLOCK_PASSING), dtype=tl.float32)
    # Every program takes many tokens, so that it leaves one partial gradient of the weight.
    for index in range(tl.program_id(0), tokens, tl.num_programs(0)):
        token = tl.full((1, 1), index, tl.int64)
        batch, position = token // S, token % S
        cos_1, cos_2, sin_1, sin_2 = load_angles(
            cos_ptr, sin_ptr, token, S, angle_stride, R, BLOCK_HALF
        )
        grad_start = grad_ptr + batch * grad_batch_stride + position * grad_token_stride
        x_start = x_ptr + batch * x_batch_stride + position * x_token_stride
        for first_head in range(0, N, BLOCK_HEADS):
            head = first_head + tl.arange(0, BLOCK_HEADS)[:, None]
            grad_1, grad_2, grad_3 = _load_parts(
                grad_start,
                head,
                grad_head_stride,
                N,
                R,
                D,
                ROTATED,
                PASSING,
                BLOCK_HALF,
                BLOCK_PASSING,
            )
            grad_1, grad_2 = rotate(grad_1, grad_2, cos_1, cos_2, sin_1, sin_2, True)
            first, second, passing = _load_parts(
                x_start, head, x_head_stride, N, R, D, ROTATED, PASSING, BLOCK_HALF, BLOCK_PASSING
            )
            square = _dot(first, second, passing, first, second, passing) / D
            inverse_rms = tl.rsqrt(square + eps)
            first *= inverse_rms
            second *= inverse_rms
            passing *= inverse_rms
            if HAS_WEIGHT:
                grad_weight_1 += grad_1 * first
                grad_weight_2 += grad_2 * second
                grad_weight_3 += grad_3 * passing
                grad_1 *= weight_1
                grad_2 *= weight_2
                grad_3 *= weight_3
            along = _dot(grad_1, grad_2, grad_3, first, second, passing) / D
            _store_parts(
                grad_x_ptr + token * (N * D),
                head,
                N,
                (grad_1 - first * along) * inverse_rms,
                (grad_2 - second * along) * inverse_rms,
                (grad_3 - passing * along) * inverse_rms,
                R,
                D,
                ROTATED,
                PASSING,
                BLOCK_HALF,
                BLOCK_PASSING,
            )
    if HAS_WEIGHT:
        _store_parts(
            partial_ptr + tl.program_id(0).to(tl.int64) * D,
            none,
            1,
            tl.sum(grad_weight_1, axis=0, keep_dims=True),
            tl.sum(grad_weight_2, axis=0, keep_dims=True),
            tl.sum(grad_weight_3, axis=0, keep_dims=True),
            R,
            D,
            ROTATED,
            PASSING,
            BLOCK_HALF,
            BLOCK_PASSING,
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
    _forward_kernel[(B * S,)](
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
        num_warps=max(1, min(8, block_query_heads * D // 512)),
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
    num_warps = max(1, min(8, block_heads * D // 512))
    programs = min(B * S, num_processors(x.device) * (16 // num_warps))
    num_partials = 0 if weight is None else programs
    partials = torch.empty((num_partials, D), dtype=torch.float32, device=x.device)
    _backward_kernel[(programs,)](
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
