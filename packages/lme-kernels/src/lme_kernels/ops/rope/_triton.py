"""Rotary position embedding in Triton: queries and keys in one launch."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from lme_kernels._triton_heads import HeadLayout, angle_stride, head_strides, load_angles, rotate
from lme_kernels._triton_launch import thin_launch
from lme_kernels.custom_ops import define
from lme_kernels.device import why_not_triton as why_not
from lme_kernels.tuning import next_power_of_two

__all__ = ["rope", "why_not"]


def rope(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, channels: str
) -> tuple[Tensor, Tensor]:
    return _Rope.apply(query, key, cos, sin, channels)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, cos, sin, channels):
        ctx.save_for_backward(cos, sin)
        ctx.channels = channels
        return _rotate(query, key, cos, sin, channels, False)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_query, grad_key):
        cos, sin = ctx.saved_tensors
        grads = _rotate(grad_query, grad_key, cos, sin, ctx.channels, True)
        return *grads, None, None, None


@triton.jit
def _rotate_heads(
    x_ptr,
    y_ptr,
    head_stride,
    heads,
    first_head,
    cos_1,
    cos_2,
    sin_1,
    sin_2,
    R: tl.constexpr,
    D: tl.constexpr,
    ROTATED: tl.constexpr,
    PASSING: tl.constexpr,
    BACKWARD: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_PASSING: tl.constexpr,
):
    """Rotate some heads of one token, which starts at `x_ptr` and, contiguous, at `y_ptr`."""
    head = first_head + tl.arange(0, BLOCK_HEADS)[:, None]
    half = tl.arange(0, BLOCK_HALF)[None, :]
    mask = (head < heads) & (half < R // 2)
    x_start = x_ptr + head * head_stride + ROTATED + half
    y_start = y_ptr + head * D + ROTATED + half
    first = tl.load(x_start, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(x_start + R // 2, mask=mask, other=0.0).to(tl.float32)
    first, second = rotate(first, second, cos_1, cos_2, sin_1, sin_2, BACKWARD)
    tl.store(y_start, first, mask=mask)
    tl.store(y_start + R // 2, second, mask=mask)
    if R < D:
        channel = tl.arange(0, BLOCK_PASSING)[None, :]
        mask = (head < heads) & (channel < D - R)
        passing = tl.load(x_ptr + head * head_stride + PASSING + channel, mask=mask)
        tl.store(y_ptr + head * D + PASSING + channel, passing, mask=mask)


@thin_launch
@triton.jit(do_not_specialize=["S"])
def _rotate_kernel(
    query_ptr,
    key_ptr,
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
    N: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    ROTATED: tl.constexpr,
    PASSING: tl.constexpr,
    BACKWARD: tl.constexpr,
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
    query_start = query_ptr + batch * query_batch_stride + position * query_token_stride
    for head in range(0, N, BLOCK_QUERY_HEADS):
        _rotate_heads(
            query_start,
            query_to_ptr + token * (N * D),
            query_head_stride,
            N,
            head,
            cos_1,
            cos_2,
            sin_1,
            sin_2,
            R,
            D,
            ROTATED,
            PASSING,
            BACKWARD,
            BLOCK_QUERY_HEADS,
            BLOCK_HALF,
            BLOCK_PASSING,
        )
    key_start = key_ptr + batch * key_batch_stride + position * key_token_stride
    for head in range(0, K, BLOCK_KEY_HEADS):
        _rotate_heads(
            key_start,
            key_to_ptr + token * (K * D),
            key_head_stride,
            K,
            head,
            cos_1,
            cos_2,
            sin_1,
            sin_2,
            R,
            D,
            ROTATED,
            PASSING,
            BACKWARD,
            BLOCK_KEY_HEADS,
            BLOCK_HALF,
            BLOCK_PASSING,
        )


def _rotate_fake(query, key, cos, sin, channels, backward):
    return query.new_empty(query.shape), key.new_empty(key.shape)


@define(
    "rope_rotate(Tensor query, Tensor key, Tensor cos, Tensor sin, str channels, bool backward) "
    "-> (Tensor, Tensor)",
    _rotate_fake,
)
def _rotate(query, key, cos, sin, channels, backward):
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
    num_warps = max(1, min(8, block_query_heads * next_power_of_two(D) // 512))
    _rotate_kernel[(B * S,)](
        query,
        key,
        cos,
        sin,
        query_to,
        key_to,
        *query_strides,
        *key_strides,
        angle_stride(cos),
        S,
        N=N,
        K=K,
        R=R,
        D=D,
        ROTATED=layout.rotated,
        PASSING=layout.passing,
        BACKWARD=backward,
        BLOCK_QUERY_HEADS=block_query_heads,
        BLOCK_KEY_HEADS=layout.block_heads(K),
        BLOCK_HALF=layout.block_half,
        BLOCK_PASSING=layout.block_passing,
        num_warps=num_warps,
    )
    return query_to, key_to
