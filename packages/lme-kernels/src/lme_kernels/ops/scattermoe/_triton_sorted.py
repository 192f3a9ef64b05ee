"""Passes over sorted rows in Triton: gather, activate, differentiate, combine, add up."""

import triton
import triton.language as tl

from lme_kernels._triton_launch import thin_launch
from lme_kernels.ops.scattermoe._triton_math import gate, gate_slope


@thin_launch
@triton.jit
def gather_kernel(x_ptr, order_ptr, y_ptr, width, top_k, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    token = (tl.load(order_ptr + row) // top_k).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + token * width + column, mask=column < width, other=0.0)
    tl.store(y_ptr + row * width + column, x, mask=column < width)


@thin_launch
@triton.jit
def combine_kernel(
    y_ptr,
    weights_ptr,
    position_ptr,
    out_ptr,
    width,
    K: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add up a token's rows in the order of its choices."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for choice in range(K):
        row = tl.load(position_ptr + token * K + choice).to(tl.int64)
        y = tl.load(y_ptr + row * width + column, mask=column < width, other=0.0).to(tl.float32)
        if WEIGHTED:
            y *= tl.load(weights_ptr + token * K + choice).to(tl.float32)
        total += y
    tl.store(out_ptr + token * width + column, total, mask=column < width)


@thin_launch
@triton.jit
def activate_kernel(
    h_ptr, y_ptr, width, FUNCTION: tl.constexpr, GATED: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    if GATED:
        both = tl.program_id(1) * (2 * BLOCK) + tl.arange(0, 2 * BLOCK)
        h = tl.load(h_ptr + row * (2 * width) + both, mask=both < 2 * width, other=0.0)
        gates, values = tl.split(tl.reshape(h.to(tl.float32), (BLOCK, 2)))
        y = gate(gates, FUNCTION) * values
    else:
        y = gate(tl.load(h_ptr + row * width + column, mask=mask).to(tl.float32), FUNCTION)
    tl.store(y_ptr + row * width + column, y, mask=mask)


@thin_launch
@triton.jit
def differentiate_kernel(
    grad_ptr,
    h_ptr,
    weights_ptr,
    order_ptr,
    grad_h_ptr,
    weighted_ptr,
    grad_weight_ptr,
    width,
    FUNCTION: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradients of pre-activations and of the router's weights, of that of activations."""
    row = tl.program_id(0).to(tl.int64)
    entry = tl.load(order_ptr + row)
    weight = tl.load(weights_ptr + entry).to(tl.float32)
    along = tl.zeros((BLOCK,), dtype=tl.float32)
    for first in range(0, width, BLOCK):
        column = first + tl.arange(0, BLOCK)
        mask = column < width
        total = tl.load(grad_ptr + row * width + column, mask=mask, other=0.0).to(tl.float32)
        grad = total * weight
        if GATED:
            both = 2 * first + tl.arange(0, 2 * BLOCK)
            h = tl.load(h_ptr + row * (2 * width) + both, mask=both < 2 * width, other=0.0)
            gates, values = tl.split(tl.reshape(h.to(tl.float32), (BLOCK, 2)))
            factor = gate(gates, FUNCTION)
            y = factor * values
            grad_h = tl.interleave(grad * values * gate_slope(gates, FUNCTION), grad * factor)
            tl.store(grad_h_ptr + row * (2 * width) + both, grad_h, mask=both < 2 * width)
        else:
            h = tl.load(h_ptr + row * width + column, mask=mask, other=0.0).to(tl.float32)
            y = gate(h, FUNCTION)
            grad_h = grad * gate_slope(h, FUNCTION)
            tl.store(grad_h_ptr + row * width + column, grad_h, mask=mask)
        tl.store(weighted_ptr + row * width + column, y * weight, mask=mask)
        along += tl.where(mask, total * y, 0.0)
    tl.store(grad_weight_ptr + entry, tl.sum(along, axis=0))


@thin_launch
@triton.jit
def add_up_kernel(
    x_ptr,
    weights_ptr,
    order_ptr,
    offsets_ptr,
    sum_ptr,
    width,
    top_k,
    GATHER: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum of each expert's rows, or of its tokens' rows times the router's weights."""
    expert = tl.program_id(0)
    start = tl.load(offsets_ptr + expert - 1, mask=expert > 0, other=0)
    end = tl.load(offsets_ptr + expert)
    column = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    total = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for first in range(start, end, ROWS):
        row = first + tl.arange(0, ROWS)
        inside = row < end
        source = row
        if GATHER:
            entry = tl.load(order_ptr + row, mask=inside, other=0)
            source = entry // top_k
        at = x_ptr + source.to(tl.int64)[:, None] * width + column
        x = tl.load(at, mask=inside[:, None] & (column < width), other=0.0).to(tl.float32)
        if GATHER:
            weight = tl.load(weights_ptr + entry, mask=inside, other=0.0).to(tl.float32)
            x *= weight[:, None]
        total += x
    target = sum_ptr + expert.to(tl.int64) * width + column
    tl.store(target, tl.sum(total, axis=0, keep_dims=True), mask=column < width)
