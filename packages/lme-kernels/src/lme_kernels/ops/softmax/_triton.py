"""Softmax in Triton: a row in registers, or in two passes where it is too wide."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from lme_kernels._triton_launch import thin_launch
from lme_kernels._triton_rows import MAX_COLUMNS, as_rows, num_rows, settings_of
from lme_kernels.custom_ops import define
from lme_kernels.device import why_not_triton
from lme_kernels.tuning import ceil_div

# Columns of one step where a row takes several.
STEP = 8192


def why_not(x: Tensor) -> str | None:
    return why_not_triton(x)


def softmax(x: Tensor, scale: float, softcap: float | None) -> Tensor:
    # A bound of 0 stands for none: kernels take no absent numbers.
    return _Softmax.apply(x, scale, softcap or 0.0)


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale, softcap):
        # Not the result: rounded probabilities would make the gradient rounder still.
        ctx.save_for_backward(x)
        ctx.scale, ctx.softcap = scale, softcap
        return _forward(x, scale, softcap)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):
        (x,) = ctx.saved_tensors
        return _backward(grad_y, x, ctx.scale, ctx.softcap), None, None


@triton.jit
def _scores(x_ptr, mask, scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """Load scores, scaled and bounded, -inf where masked, and the slope of the bound."""
    x = tl.load(x_ptr, mask=mask, other=0.0).to(tl.float32) * scale
    slope = tl.full(x.shape, 1.0, tl.float32)
    if HAS_SOFTCAP:
        # Written with exp(-2|x|), so that neither saturates early; no target lacks exp.
        decay = tl.exp(-2.0 * tl.abs(x / softcap))
        tanh = (1.0 - decay) / (1.0 + decay)
        x = softcap * tl.where(x < 0.0, -tanh, tanh)
        slope = 4.0 * decay / ((1.0 + decay) * (1.0 + decay))
    return tl.where(mask, x, float("-inf")), slope


@triton.jit
def _largest(x):
    """Largest score of each row; 0 where all are -inf, which makes 0 / 0 of them."""
    largest = tl.max(x, axis=1, keep_dims=True)
    return tl.where(largest == float("-inf"), 0.0, largest)


@thin_launch
@triton.jit(do_not_specialize=["rows"])
def _forward_kernel(
    x_ptr,
    y_ptr,
    x_stride,
    rows,
    columns,
    scale,
    softcap,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS).to(tl.int64)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    mask = (row < rows) & (column < columns)
    x, _ = _scores(x_ptr + row * x_stride + column, mask, scale, softcap, HAS_SOFTCAP)
    powers = tl.exp(x - _largest(x))
    y = powers / tl.sum(powers, axis=1, keep_dims=True)
    tl.store(y_ptr + row * columns + column, y, mask=mask)


@thin_launch
@triton.jit(do_not_specialize=["rows"])
def _backward_kernel(
    grad_y_ptr,
    x_ptr,
    grad_x_ptr,
    grad_y_stride,
    x_stride,
    rows,
    columns,
    scale,
    softcap,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS).to(tl.int64)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    mask = (row < rows) & (column < columns)
    x, slope = _scores(x_ptr + row * x_stride + column, mask, scale, softcap, HAS_SOFTCAP)
    grad = tl.load(grad_y_ptr + row * grad_y_stride + column, mask=mask, other=0.0).to(tl.float32)
    powers = tl.exp(x - _largest(x))
    y = powers / tl.sum(powers, axis=1, keep_dims=True)
    along = tl.sum(grad * y, axis=1, keep_dims=True)
    grad_x = y * (grad - along) * slope * scale
    tl.store(grad_x_ptr + row * columns + column, grad_x, mask=mask)


@thin_launch
@triton.jit
def _wide_forward_kernel(
    x_ptr,
    y_ptr,
    x_stride,
    columns,
    scale,
    softcap,
    HAS_SOFTCAP: tl.constexpr,
    STEP: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, STEP)
    # Running maximum and sum of each lane; one reduction at the end.
    largest = tl.full((STEP,), float("-inf"), tl.float32)
    total = tl.zeros((STEP,), dtype=tl.float32)
    for start in range(0, columns, STEP):
        mask = start + column < columns
        x, _ = _scores(x_ptr + row * x_stride + start + column, mask, scale, softcap, HAS_SOFTCAP)
        grown = tl.maximum(largest, x)
        shift = tl.where(grown == float("-inf"), 0.0, grown)
        total = total * tl.exp(largest - shift) + tl.exp(x - shift)
        largest = grown
    highest = tl.max(largest, axis=0)
    normaliser = tl.sum(total * tl.exp(largest - highest), axis=0)
    for start in range(0, columns, STEP):
        mask = start + column < columns
        x, _ = _scores(x_ptr + row * x_stride + start + column, mask, scale, softcap, HAS_SOFTCAP)
        y = tl.exp(x - highest) / normaliser
        tl.store(y_ptr + row * columns + start + column, y, mask=mask)


@thin_launch
@triton.jit
def _wide_backward_kernel(
    grad_y_ptr,
    x_ptr,
    grad_x_ptr,
    grad_y_stride,
    x_stride,
    columns,
    scale,
    softcap,
    HAS_SOFTCAP: tl.constexpr,
    STEP: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, STEP)
    largest = tl.full((STEP,), float("-inf"), tl.float32)
    total = tl.zeros((STEP,), dtype=tl.float32)
    weighted = tl.zeros((STEP,), dtype=tl.float32)
    grad_start = grad_y_ptr + row * grad_y_stride
    for start in range(0, columns, STEP):
        mask = start + column < columns
        x, _ = _scores(x_ptr + row * x_stride + start + column, mask, scale, softcap, HAS_SOFTCAP)
        grad = tl.load(grad_start + start + column, mask=mask, other=0.0).to(tl.float32)
        grown = tl.maximum(largest, x)
        shift = tl.where(grown == float("-inf"), 0.0, grown)
        shrink = tl.exp(largest - shift)
        powers = tl.exp(x - shift)
        total = total * shrink + powers
        weighted = weighted * shrink + powers * grad
        largest = grown
    highest = tl.max(largest, axis=0)
    shrink = tl.exp(largest - highest)
    normaliser = tl.sum(total * shrink, axis=0)
    along = tl.sum(weighted * shrink, axis=0) / normaliser
    for start in range(0, columns, STEP):
        mask = start + column < columns
        x, slope = _scores(
            x_ptr + row * x_stride + start + column, mask, scale, softcap, HAS_SOFTCAP
        )
        grad = tl.load(grad_start + start + column, mask=mask, other=0.0).to(tl.float32)
        y = tl.exp(x - highest) / normaliser
        grad_x = y * (grad - along) * slope * scale
        tl.store(grad_x_ptr + row * columns + start + column, grad_x, mask=mask)


def _forward_fake(x, scale, softcap):
    return x.new_empty(x.shape)


@define("softmax_forward(Tensor x, float scale, float softcap) -> Tensor", _forward_fake)
def _forward(x, scale, softcap):
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return y
    x, x_stride = as_rows(x)
    rows, columns = num_rows(x), x.shape[-1]
    capped = softcap > 0.0
    if columns > MAX_COLUMNS:
        _wide_forward_kernel[(rows,)](
            x, y, x_stride, columns, scale, softcap, HAS_SOFTCAP=capped, STEP=STEP, num_warps=16
        )
        return y
    settings = settings_of("softmax.forward", x, rows)
    _forward_kernel[(ceil_div(rows, settings.block_rows),)](
        x,
        y,
        x_stride,
        rows,
        columns,
        scale,
        softcap,
        HAS_SOFTCAP=capped,
        BLOCK_ROWS=settings.block_rows,
        BLOCK=settings.block_columns,
        num_warps=settings.num_warps,
    )
    return y


def _backward_fake(grad_y, x, scale, softcap):
    return x.new_empty(x.shape)


@define(
    "softmax_backward(Tensor grad_y, Tensor x, float scale, float softcap) -> Tensor",
    _backward_fake,
)
def _backward(grad_y, x, scale, softcap):
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return grad_x
    x, x_stride = as_rows(x)
    grad_y, grad_y_stride = as_rows(grad_y)
    rows, columns = num_rows(x), x.shape[-1]
    capped = softcap > 0.0
    arguments = (grad_y, x, grad_x, grad_y_stride, x_stride)
    if columns > MAX_COLUMNS:
        _wide_backward_kernel[(rows,)](
            *arguments, columns, scale, softcap, HAS_SOFTCAP=capped, STEP=STEP, num_warps=16
        )
        return grad_x
    # One pass a row, as in the forward.
    settings = settings_of("softmax.forward", x, rows)
    _backward_kernel[(ceil_div(rows, settings.block_rows),)](
        *arguments,
        rows,
        columns,
        scale,
        softcap,
        HAS_SOFTCAP=capped,
        BLOCK_ROWS=settings.block_rows,
        BLOCK=settings.block_columns,
        num_warps=settings.num_warps,
    )
    return grad_x
