"""Products of sorted rows with their experts' weights, in Triton."""

import triton
import triton.language as tl

from lme_kernels._triton_launch import thin_launch
from lme_kernels.ops.scattermoe._triton_math import gate, gate_slope, locate, tile_of_program

# What follows the product in the same kernel.
PLAIN, ACTIVATE, DIFFERENTIATE = 0, 1, 2


@thin_launch
@triton.jit(do_not_specialize=["tiles_m", "total_rows"])
def product_kernel(
    a_ptr,
    b_ptr,
    c_ptr,
    order_ptr,
    offsets_ptr,
    bias_ptr,
    activated_ptr,
    pre_ptr,
    weights_ptr,
    partial_ptr,
    tiles_m,
    total_rows,
    num_experts,
    N,
    K,
    top_k,
    GATHER: tl.constexpr,
    K_LAST: tl.constexpr,
    EPILOGUE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    FUNCTION: tl.constexpr,
    GATED: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Multiply rows of `a` (total_rows or tokens, K) by b[expert], (N, K) or (K, N).

    ACTIVATE stores the product in `c` and its activation in `activated`. DIFFERENTIATE takes the
    product for the gradient of activations before the router's weights: stores the gradient of the
    pre-activations in `c`, the weighted activations in `activated`, and the parts of the weights'
    gradients that this tile's columns have in `partial`.
    """
    tile_m, tile_n = tile_of_program(tiles_m, tl.cdiv(N, COLUMNS), GROUP)
    expert, start, end = locate(tile_m, offsets_ptr, num_experts, ROWS, BLOCK_EXPERTS)
    if start >= end:
        return
    rows = start + tl.arange(0, ROWS)
    inside = rows < end
    entry = rows
    if GATHER or EPILOGUE == 2:
        entry = tl.load(order_ptr + rows, mask=inside, other=0)
    source = entry // top_k if GATHER else tl.minimum(rows, total_rows - 1)
    column = tile_n * COLUMNS + tl.arange(0, COLUMNS)
    # Columns past the end repeat the first, and are not stored.
    safe = tl.where(column < N, column, 0)
    depth = tl.arange(0, DEPTH)
    a = a_ptr + source.to(tl.int64)[:, None] * K + depth[None, :]
    b = b_ptr + expert.to(tl.int64) * N * K
    if K_LAST:
        b = b + safe.to(tl.int64)[None, :] * K + depth[:, None]
        step = DEPTH
    else:
        b = b + depth.to(tl.int64)[:, None] * N + safe[None, :]
        step = DEPTH * N
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for first in range(0, K, DEPTH):
        if EVEN_K:
            left = tl.load(a)
            right = tl.load(b)
        else:
            rest = K - first
            left = tl.load(a, mask=depth[None, :] < rest, other=0.0)
            right = tl.load(b, mask=depth[:, None] < rest, other=0.0)
        total = tl.dot(left, right, total, input_precision=PRECISION)
        a += DEPTH
        b += step
    if HAS_BIAS:
        bias = tl.load(bias_ptr + expert.to(tl.int64) * N + column, mask=column < N, other=0.0)
        total += bias.to(tl.float32)[None, :]
    mask = inside[:, None] & (column < N)[None, :]
    wide = rows.to(tl.int64)[:, None]
    if EPILOGUE == 0:
        tl.store(c_ptr + wide * N + column[None, :], total, mask=mask)
    elif EPILOGUE == 1:
        rounded = total.to(c_ptr.dtype.element_ty)
        tl.store(c_ptr + wide * N + column[None, :], rounded, mask=mask)
        h = rounded.to(tl.float32)
        if GATED:
            gates, values = tl.split(tl.reshape(h, (ROWS, COLUMNS // 2, 2)))
            half = tile_n * (COLUMNS // 2) + tl.arange(0, COLUMNS // 2)
            target = activated_ptr + wide * (N // 2) + half[None, :]
            fits = inside[:, None] & (half < N // 2)[None, :]
            tl.store(target, gate(gates, FUNCTION) * values, mask=fits)
        else:
            tl.store(activated_ptr + wide * N + column[None, :], gate(h, FUNCTION), mask=mask)
    else:
        weight = tl.load(weights_ptr + entry, mask=inside, other=0.0).to(tl.float32)[:, None]
        grad = total * weight
        if GATED:
            both = tile_n * (2 * COLUMNS) + tl.arange(0, 2 * COLUMNS)
            fits = inside[:, None] & (both < 2 * N)[None, :]
            h = tl.load(pre_ptr + wide * (2 * N) + both[None, :], mask=fits, other=0.0)
            pairs = tl.reshape(h.to(tl.float32), (ROWS, COLUMNS, 2))
            gates, values = tl.split(pairs)
            factor = gate(gates, FUNCTION)
            activated = factor * values
            pair = tl.join(grad * values * gate_slope(gates, FUNCTION), grad * factor)
            grad_h = tl.reshape(pair, (ROWS, 2 * COLUMNS))
            tl.store(c_ptr + wide * (2 * N) + both[None, :], grad_h, mask=fits)
        else:
            h = tl.load(pre_ptr + wide * N + column[None, :], mask=mask, other=0.0).to(tl.float32)
            activated = gate(h, FUNCTION)
            grad_h = grad * gate_slope(h, FUNCTION)
            tl.store(c_ptr + wide * N + column[None, :], grad_h, mask=mask)
        tl.store(activated_ptr + wide * N + column[None, :], activated * weight, mask=mask)
        part = tl.sum(tl.where(mask, total * activated, 0.0), axis=1)
        place = tile_n.to(tl.int64) * total_rows + entry
        tl.store(partial_ptr + place, part, mask=inside)


@thin_launch
@triton.jit
def weight_gradient_kernel(
    left_ptr,
    right_ptr,
    out_ptr,
    order_ptr,
    offsets_ptr,
    M,
    N,
    top_k,
    GATHER_LEFT: tl.constexpr,
    GATHER_RIGHT: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Sum over an expert's rows of left (rows, M) transposed times right (rows, N): (E, M, N)."""
    expert = tl.program_id(1)
    tile_m, tile_n = tile_of_program(tl.cdiv(M, ROWS), tl.cdiv(N, COLUMNS), GROUP)
    start = tl.load(offsets_ptr + expert - 1, mask=expert > 0, other=0)
    end = tl.load(offsets_ptr + expert)
    m = tile_m * ROWS + tl.arange(0, ROWS)
    n = tile_n * COLUMNS + tl.arange(0, COLUMNS)
    safe_m = tl.where(m < M, m, 0)
    safe_n = tl.where(n < N, n, 0)
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for first in range(start, end, DEPTH):
        row = first + tl.arange(0, DEPTH)
        inside = row < end
        left_row = row.to(tl.int64)
        right_row = row.to(tl.int64)
        if GATHER_LEFT or GATHER_RIGHT:
            token = (tl.load(order_ptr + row, mask=inside, other=0) // top_k).to(tl.int64)
            if GATHER_LEFT:
                left_row = token
            if GATHER_RIGHT:
                right_row = token
        left_at = left_ptr + left_row[:, None] * M + safe_m[None, :]
        right_at = right_ptr + right_row[:, None] * N + safe_n[None, :]
        left = tl.load(left_at, mask=inside[:, None], other=0.0)
        right = tl.load(right_at, mask=inside[:, None], other=0.0)
        total = tl.dot(tl.trans(left), right, total, input_precision=PRECISION)
    target = out_ptr + expert.to(tl.int64) * M * N + m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(target, total, mask=(m < M)[:, None] & (n < N)[None, :])
