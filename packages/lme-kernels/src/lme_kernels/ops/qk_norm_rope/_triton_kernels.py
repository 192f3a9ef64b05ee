"""Kernels of the normalisation and rotation of heads."""

import triton
import triton.language as tl

from lme_kernels._triton_heads import load_angles, rotate
from lme_kernels._triton_launch import thin_launch


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


@thin_launch
@triton.jit(do_not_specialize=["S"])
def forward_kernel(
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


@thin_launch
@triton.jit(do_not_specialize=["S", "tokens"])
def backward_kernel(
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
