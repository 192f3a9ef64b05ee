"""Root mean square normalisation in Triton: a row stays in registers."""

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


def rmsnorm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    return _RMSNorm.apply(x, weight, eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return _forward(x, weight, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):
        x, weight = ctx.saved_tensors
        grad_x, grad_weight = _backward(grad_y, x, weight, ctx.eps)
        return grad_x, None if weight is None else grad_weight, None


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
    HAS_WEIGHT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS).to(tl.int64)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    mask = (row < rows) & (column < columns)
    x = tl.load(x_ptr + row * x_stride + column, mask=mask, other=0.0).to(tl.float32)
    inverse_rms = tl.rsqrt(tl.sum(x * x, axis=1, keep_dims=True) / columns + eps)
    y = x * inverse_rms
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
    HAS_WEIGHT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    column = tl.arange(0, BLOCK)[None, :]
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + column, mask=column < columns, other=0.0).to(tl.float32)
        grad_weight = tl.zeros((BLOCK_ROWS, BLOCK), dtype=tl.float32)
    # Every program takes many rows, so that it leaves one partial gradient of the weight.
    for start in range(tl.program_id(0) * BLOCK_ROWS, rows, tl.num_programs(0) * BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS).to(tl.int64)[:, None]
        mask = (row < rows) & (column < columns)
        x = tl.load(x_ptr + row * x_stride + column, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(grad_y_ptr + row * grad_y_stride + column, mask=mask, other=0.0)
        grad = grad.to(tl.float32)
        inverse_rms = tl.rsqrt(tl.sum(x * x, axis=1, keep_dims=True) / columns + eps)
        x *= inverse_rms
        if HAS_WEIGHT:
            grad_weight += grad * x
            grad *= weight
        along = tl.sum(grad * x, axis=1, keep_dims=True) / columns
        grad_x = (grad - x * along) * inverse_rms
        tl.store(grad_x_ptr + row * columns + column, grad_x, mask=mask)
    if HAS_WEIGHT:
        offset = tl.program_id(0).to(tl.int64) * columns + tl.arange(0, BLOCK)
        partial = tl.sum(grad_weight, axis=0)
        tl.store(partial_ptr + offset, partial, mask=tl.arange(0, BLOCK) < columns)


def _forward_fake(x, weight, eps):
    return x.new_empty(x.shape)


@define("rmsnorm_forward(Tensor x, Tensor? weight, float eps) -> Tensor", _forward_fake)
def _forward(x, weight, eps):
    x, x_stride = as_rows(x)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows, columns = num_rows(x), x.shape[-1]
    if rows == 0:
        return y
    settings = settings_of("rmsnorm.forward", x, rows)
    _forward_kernel[(ceil_div(rows, settings.block_rows),)](
        x,
        weight,
        y,
        x_stride,
        rows,
        columns,
        eps,
        HAS_WEIGHT=weight is not None,
        BLOCK_ROWS=settings.block_rows,
        BLOCK=settings.block_columns,
        num_warps=settings.num_warps,
    )
    return y


def _backward_fake(grad_y, x, weight, eps):
    return x.new_empty(x.shape), x.new_empty(0) if weight is None else torch.empty_like(weight)


@define(
    "rmsnorm_backward(Tensor grad_y, Tensor x, Tensor? weight, float eps) -> (Tensor, Tensor)",
    _backward_fake,
)
def _backward(grad_y, x, weight, eps):
    x, x_stride = as_rows(x)
    grad_y, grad_y_stride = as_rows(grad_y)
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows, columns = num_rows(x), x.shape[-1]
    if rows == 0:
        return grad_x, x.new_empty(0) if weight is None else torch.zeros_like(weight)
    settings = settings_of("rmsnorm.backward", x, rows)
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
        HAS_WEIGHT=weight is not None,
        BLOCK_ROWS=settings.block_rows,
        BLOCK=settings.block_columns,
        num_warps=settings.num_warps,
    )
    if weight is None:
        return grad_x, x.new_empty(0)
    return grad_x, sum_partials(partials, weight.dtype)
