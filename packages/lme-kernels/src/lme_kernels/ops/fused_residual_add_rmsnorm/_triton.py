"""Residual addition and root mean square normalisation in Triton."""

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


def why_not(x: Tensor, residual: Tensor, weight: Tensor | None) -> str | None:
    return why_not_triton(x, residual, weight) or why_not_rows(x)


def fused_residual_add_rmsnorm(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, scale: float
) -> tuple[Tensor, Tensor]:
    return _AddRMSNorm.apply(x, residual, weight, eps, scale)


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, weight, eps, scale):
        y, new_residual = _forward(x, residual, weight, eps, scale)
        ctx.save_for_backward(new_residual, weight)
        ctx.eps, ctx.scale = eps, scale
        return y, new_residual

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y, grad_new_residual):
        new_residual, weight = ctx.saved_tensors
        grad_residual, grad_x, grad_weight = _backward(
            grad_y, grad_new_residual, new_residual, weight, ctx.eps, ctx.scale
        )
        if ctx.scale == 1.0:
            grad_x = grad_residual
        return grad_x, grad_residual, None if weight is None else grad_weight, None, None


@thin_launch
@triton.jit(do_not_specialize=["rows"])
def _forward_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    y_ptr,
    new_residual_ptr,
    x_stride,
    residual_stride,
    rows,
    columns,
    eps,
    scale,
    HAS_WEIGHT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS).to(tl.int64)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    mask = (row < rows) & (column < columns)
    x = tl.load(x_ptr + row * x_stride + column, mask=mask, other=0.0).to(tl.float32)
    old = tl.load(residual_ptr + row * residual_stride + column, mask=mask, other=0.0)
    # Rounded first: the backward finds the rounded sum, and so does the next block.
    new = (old.to(tl.float32) + scale * x).to(new_residual_ptr.dtype.element_ty)
    tl.store(new_residual_ptr + row * columns + column, new, mask=mask)
    y = new.to(tl.float32)
    y *= tl.rsqrt(tl.sum(y * y, axis=1, keep_dims=True) / columns + eps)
    if HAS_WEIGHT:
        y *= tl.load(weight_ptr + column, mask=column < columns, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * columns + column, y, mask=mask)


@thin_launch
@triton.jit(do_not_specialize=["rows"])
def _backward_kernel(
    grad_y_ptr,
    grad_new_ptr,
    new_residual_ptr,
    weight_ptr,
    grad_residual_ptr,
    grad_x_ptr,
    partial_ptr,
    grad_y_stride,
    grad_new_stride,
    new_residual_stride,
    rows,
    columns,
    eps,
    scale,
    HAS_WEIGHT: tl.constexpr,
    HAS_SCALE: tl.constexpr,
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
        x_at = new_residual_ptr + row * new_residual_stride + column
        x = tl.load(x_at, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(grad_y_ptr + row * grad_y_stride + column, mask=mask, other=0.0)
        grad = grad.to(tl.float32)
        grad_new = tl.load(grad_new_ptr + row * grad_new_stride + column, mask=mask, other=0.0)
        inverse_rms = tl.rsqrt(tl.sum(x * x, axis=1, keep_dims=True) / columns + eps)
        x *= inverse_rms
        if HAS_WEIGHT:
            grad_weight += grad * x
            grad *= weight
        along = tl.sum(grad * x, axis=1, keep_dims=True) / columns
        total = (grad - x * along) * inverse_rms + grad_new.to(tl.float32)
        tl.store(grad_residual_ptr + row * columns + column, total, mask=mask)
        if HAS_SCALE:
            tl.store(grad_x_ptr + row * columns + column, total * scale, mask=mask)
    if HAS_WEIGHT:
        offset = tl.program_id(0).to(tl.int64) * columns + tl.arange(0, BLOCK)
        partial = tl.sum(grad_weight, axis=0)
        tl.store(partial_ptr + offset, partial, mask=tl.arange(0, BLOCK) < columns)


def _forward_fake(x, residual, weight, eps, scale):
    return x.new_empty(x.shape), x.new_empty(x.shape)


@define(
    "fused_residual_add_rmsnorm_forward("
    "Tensor x, Tensor residual, Tensor? weight, float eps, float scale) -> (Tensor, Tensor)",
    _forward_fake,
)
def _forward(x, residual, weight, eps, scale):
    x, x_stride = as_rows(x)
    residual, residual_stride = as_rows(residual)
    y, new_residual = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    rows, columns = num_rows(x), x.shape[-1]
    if rows == 0:
        return y, new_residual
    settings = settings_of("fused_residual_add_rmsnorm.forward", x, rows)
    _forward_kernel[(ceil_div(rows, settings.block_rows),)](
        x,
        residual,
        weight,
        y,
        new_residual,
        x_stride,
        residual_stride,
        rows,
        columns,
        eps,
        scale,
        HAS_WEIGHT=weight is not None,
        BLOCK_ROWS=settings.block_rows,
        BLOCK=settings.block_columns,
        num_warps=settings.num_warps,
    )
    return y, new_residual


def _backward_fake(grad_y, grad_new_residual, new_residual, weight, eps, scale):
    grad_residual = new_residual.new_empty(new_residual.shape)
    return (
        grad_residual,
        new_residual.new_empty(0) if scale == 1.0 else torch.empty_like(grad_residual),
        new_residual.new_empty(0) if weight is None else torch.empty_like(weight),
    )


@define(
    "fused_residual_add_rmsnorm_backward(Tensor grad_y, Tensor grad_new_residual, "
    "Tensor new_residual, Tensor? weight, float eps, float scale) -> (Tensor, Tensor, Tensor)",
    _backward_fake,
)
def _backward(grad_y, grad_new_residual, new_residual, weight, eps, scale):
    x, x_stride = as_rows(new_residual)
    grad_y, grad_y_stride = as_rows(grad_y)
    grad_new, grad_new_stride = as_rows(grad_new_residual)
    grad_residual = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    grad_x = torch.empty(0 if scale == 1.0 else x.shape, dtype=x.dtype, device=x.device)
    rows, columns = num_rows(x), x.shape[-1]
    if rows == 0:
        return (
            grad_residual,
            grad_x,
            x.new_empty(0) if weight is None else weight.new_zeros(columns),
        )
    settings = settings_of("fused_residual_add_rmsnorm.backward", x, rows)
    num_partials = 0 if weight is None else settings.programs
    partials = torch.empty((num_partials, columns), dtype=torch.float32, device=x.device)
    _backward_kernel[(settings.programs,)](
        grad_y,
        grad_new,
        x,
        weight,
        grad_residual,
        grad_x,
        partials,
        grad_y_stride,
        grad_new_stride,
        x_stride,
        rows,
        columns,
        eps,
        scale,
        HAS_WEIGHT=weight is not None,
        HAS_SCALE=scale != 1.0,
        BLOCK_ROWS=settings.block_rows,
        BLOCK=settings.block_columns,
        num_warps=settings.num_warps,
    )
    grad_weight = x.new_empty(0) if weight is None else sum_partials(partials, weight.dtype)
    return grad_residual, grad_x, grad_weight
