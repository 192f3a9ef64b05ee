"""Normalisation by the p-norm in Triton: a row stays in registers."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from lme_kernels._triton_launch import thin_launch
from lme_kernels._triton_rows import as_rows, num_rows, settings_of, sum_partials, why_not_rows
from lme_kernels.custom_ops import define
from lme_kernels.device import why_not_triton
from lme_kernels.tuning import ceil_div


def why_not(x: Tensor, weight: Tensor | None) -> str | None:
    return why_not_triton(x, weight) or why_not_rows(x)


def p_norm(x: Tensor, weight: Tensor | None, p: float, eps: float) -> Tensor:
    return _PNorm.apply(x, weight, p, eps)


class _PNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, p, eps):
        ctx.save_for_backward(x, weight)
        ctx.p, ctx.eps = p, eps
        return _forward(x, weight, p, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):
        x, weight = ctx.saved_tensors
        grad_x, grad_weight = _backward(grad_y, x, weight, ctx.p, ctx.eps)
        return grad_x, None if weight is None else grad_weight, None, None


@triton.jit
def _power(x, P: tl.constexpr):
    """Raise numbers that are not negative to a power that is not negative."""
    if P == 0.0:
        y = tl.full(x.shape, 1.0, tl.float32)
    elif P == 1.0:
        y = x
    elif P == 2.0:
        y = x * x
    elif P == 3.0:
        y = x * x * x
    elif P == 4.0:
        y = x * x * x * x
    else:
        y = tl.where(x > 0.0, tl.exp2(P * tl.log2(tl.where(x > 0.0, x, 1.0))), 0.0)
    return y


@triton.jit
def _norm(x, P: tl.constexpr):
    """Norms of the rows of `x`, and of `x` over its largest magnitude, and that magnitude."""
    # Scaled by the largest magnitude, so that no power overflows or vanishes.
    largest = tl.max(tl.abs(x), axis=1, keep_dims=True)
    largest = tl.where(largest > 0.0, largest, 1.0)
    total = tl.sum(_power(tl.abs(x) / largest, P), axis=1, keep_dims=True)
    if P == 1.0:
        root = total
    elif P == 2.0:
        root = tl.sqrt(total)
    else:
        root = tl.where(total > 0.0, tl.exp2(tl.log2(tl.where(total > 0.0, total, 1.0)) / P), 0.0)
    return root * largest


@thin_launch
@triton.jit(do_not_specialize=["rows"])
def _forward_kernel(
    x_ptr,
    weight_ptr,
    y_ptr,
    x_stride,
    rows,
    columns,
    eps,
    P: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS).to(tl.int64)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    mask = (row < rows) & (column < columns)
    x = tl.load(x_ptr + row * x_stride + column, mask=mask, other=0.0).to(tl.float32)
    y = x / tl.maximum(_norm(x, P), eps)
    if HAS_WEIGHT:
        y *= tl.load(weight_ptr + column, mask=column < columns, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * columns + column, y, mask=mask)


@thin_launch
@triton.jit(do_not_specialize=["rows"])
def _backward_kernel(
    grad_y_ptr,
    x_ptr,
    weight_ptr,
    grad_x_ptr,
    partial_ptr,
    grad_y_stride,
    x_stride,
    rows,
    columns,
    eps,
    P: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    column = tl.arange(0, BLOCK)[None, :]
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + column, mask=column < columns, other=0.0).to(tl.float32)
        grad_weight = tl.zeros((BLOCK_ROWS, BLOCK), dtype=tl.float32)
    for start in range(tl.program_id(0) * BLOCK_ROWS, rows, tl.num_programs(0) * BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS).to(tl.int64)[:, None]
        mask = (row < rows) & (column < columns)
        x = tl.load(x_ptr + row * x_stride + column, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(grad_y_ptr + row * grad_y_stride + column, mask=mask, other=0.0)
        grad = grad.to(tl.float32)
        norm = _norm(x, P)
        divisor = tl.maximum(norm, eps)
        x /= divisor
        if HAS_WEIGHT:
            grad_weight += grad * x
            grad *= weight
        along = tl.sum(grad * x, axis=1, keep_dims=True)
        # Slope of the norm by each element; a row shorter than `eps` has a constant divisor.
        slope = tl.where(x < 0.0, -1.0, tl.where(x > 0.0, 1.0, 0.0)) * _power(tl.abs(x), P - 1.0)
        grad_x = (grad - tl.where(norm >= eps, slope * along, 0.0)) / divisor
        tl.store(grad_x_ptr + row * columns + column, grad_x, mask=mask)
    if HAS_WEIGHT:
        offset = tl.program_id(0).to(tl.int64) * columns + tl.arange(0, BLOCK)
        partial = tl.sum(grad_weight, axis=0)
        tl.store(partial_ptr + offset, partial, mask=tl.arange(0, BLOCK) < columns)


def _forward_fake(x, weight, p, eps):
    return x.new_empty(x.shape)


@define("p_norm_forward(Tensor x, Tensor? weight, float p, float eps) -> Tensor", _forward_fake)
def _forward(x, weight, p, eps):
    x, x_stride = as_rows(x)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows, columns = num_rows(x), x.shape[-1]
    if rows == 0:
        return y
    settings = settings_of("p_norm.forward", x, rows)
    _forward_kernel[(ceil_div(rows, settings.block_rows),)](
        x,
        weight,
        y,
        x_stride,
        rows,
        columns,
        eps,
        P=float(p),
        HAS_WEIGHT=weight is not None,
        BLOCK_ROWS=settings.block_rows,
        BLOCK=settings.block_columns,
        num_warps=settings.num_warps,
    )
    return y


def _backward_fake(grad_y, x, weight, p, eps):
    return x.new_empty(x.shape), x.new_empty(0) if weight is None else torch.empty_like(weight)


@define(
    "p_norm_backward(Tensor grad_y, Tensor x, Tensor? weight, float p, float eps) "
    "-> (Tensor, Tensor)",
    _backward_fake,
)
def _backward(grad_y, x, weight, p, eps):
    x, x_stride = as_rows(x)
    grad_y, grad_y_stride = as_rows(grad_y)
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows, columns = num_rows(x), x.shape[-1]
    if rows == 0:
        return grad_x, x.new_empty(0) if weight is None else torch.zeros_like(weight)
    settings = settings_of("p_norm.backward", x, rows)
    num_partials = 0 if weight is None else settings.programs
    partials = torch.empty((num_partials, columns), dtype=torch.float32, device=x.device)
    _backward_kernel[(settings.programs,)](
        grad_y,
        x,
        weight,
        grad_x,
        partials,
        grad_y_stride,
        x_stride,
        rows,
        columns,
        eps,
        P=float(p),
        HAS_WEIGHT=weight is not None,
        BLOCK_ROWS=settings.block_rows,
        BLOCK=settings.block_columns,
        num_warps=settings.num_warps,
    )
    if weight is None:
        return grad_x, x.new_empty(0)
    return grad_x, sum_partials(partials, weight.dtype)
