"""Layer normalisation in Triton: a row stays in registers."""

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


def why_not(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> str | None:
    return why_not_triton(x, weight, bias) or why_not_rows(x)


def layernorm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return _LayerNorm.apply(x, weight, bias, eps)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        ctx.save_for_backward(x, weight)
        ctx.eps, ctx.bias_dtype = eps, None if bias is None else bias.dtype
        return _forward(x, weight, bias, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):
        x, weight = ctx.saved_tensors
        grad_x, grad_weight, grad_bias = _backward(grad_y, x, weight, ctx.bias_dtype, ctx.eps)
        return (
            grad_x,
            None if weight is None else grad_weight,
            None if ctx.bias_dtype is None else grad_bias,
            None,
        )


@triton.jit
def _standardise(x, mask, columns, eps):
    """Centre rows, which are 0 where masked, and divide them by their deviation."""
    mean = tl.sum(x, axis=1, keep_dims=True) / columns
    centred = tl.where(mask, x - mean, 0.0)
    variance = tl.sum(centred * centred, axis=1, keep_dims=True) / columns
    inverse_deviation = tl.rsqrt(variance + eps)
    return centred * inverse_deviation, inverse_deviation


@thin_launch
@triton.jit(do_not_specialize=["rows"])
def _forward_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    x_stride,
    rows,
    columns,
    eps,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS).to(tl.int64)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    mask = (row < rows) & (column < columns)
    x = tl.load(x_ptr + row * x_stride + column, mask=mask, other=0.0).to(tl.float32)
    y, _ = _standardise(x, mask, columns, eps)
    if HAS_WEIGHT:
        y *= tl.load(weight_ptr + column, mask=column < columns, other=0.0).to(tl.float32)
    if HAS_BIAS:
        y += tl.load(bias_ptr + column, mask=column < columns, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * columns + column, y, mask=mask)


@thin_launch
@triton.jit(do_not_specialize=["rows"])
def _backward_kernel(
    grad_y_ptr,
    x_ptr,
    weight_ptr,
    grad_x_ptr,
    weight_partial_ptr,
    bias_partial_ptr,
    grad_y_stride,
    x_stride,
    rows,
    columns,
    eps,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    column = tl.arange(0, BLOCK)[None, :]
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + column, mask=column < columns, other=0.0).to(tl.float32)
        grad_weight = tl.zeros((BLOCK_ROWS, BLOCK), dtype=tl.float32)
    if HAS_BIAS:
        grad_bias = tl.zeros((BLOCK_ROWS, BLOCK), dtype=tl.float32)
    for start in range(tl.program_id(0) * BLOCK_ROWS, rows, tl.num_programs(0) * BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS).to(tl.int64)[:, None]
        mask = (row < rows) & (column < columns)
        x = tl.load(x_ptr + row * x_stride + column, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(grad_y_ptr + row * grad_y_stride + column, mask=mask, other=0.0)
        grad = grad.to(tl.float32)
        x, inverse_deviation = _standardise(x, mask, columns, eps)
        if HAS_BIAS:
            grad_bias += grad
        if HAS_WEIGHT:
            grad_weight += grad * x
            grad *= weight
        mean = tl.sum(grad, axis=1, keep_dims=True) / columns
        along = tl.sum(grad * x, axis=1, keep_dims=True) / columns
        grad_x = (grad - mean - x * along) * inverse_deviation
        tl.store(grad_x_ptr + row * columns + column, grad_x, mask=mask)
    offset = tl.program_id(0).to(tl.int64) * columns + tl.arange(0, BLOCK)
    within = tl.arange(0, BLOCK) < columns
    if HAS_WEIGHT:
        tl.store(weight_partial_ptr + offset, tl.sum(grad_weight, axis=0), mask=within)
    if HAS_BIAS:
        tl.store(bias_partial_ptr + offset, tl.sum(grad_bias, axis=0), mask=within)


def _forward_fake(x, weight, bias, eps):
    return x.new_empty(x.shape)


@define(
    "layernorm_forward(Tensor x, Tensor? weight, Tensor? bias, float eps) -> Tensor",
    _forward_fake,
)
def _forward(x, weight, bias, eps):
    x, x_stride = as_rows(x)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows, columns = num_rows(x), x.shape[-1]
    if rows == 0:
        return y
    settings = settings_of("layernorm.forward", x, rows)
    _forward_kernel[(ceil_div(rows, settings.block_rows),)](
        x,
        weight,
        bias,
        y,
        x_stride,
        rows,
        columns,
        eps,
        HAS_WEIGHT=weight is not None,
        HAS_BIAS=bias is not None,
        BLOCK_ROWS=settings.block_rows,
        BLOCK=settings.block_columns,
        num_warps=settings.num_warps,
    )
    return y


def _backward_fake(grad_y, x, weight, bias_dtype, eps):
    return (
        x.new_empty(x.shape),
        x.new_empty(0) if weight is None else torch.empty_like(weight),
        x.new_empty(0) if bias_dtype is None else x.new_empty(x.shape[-1], dtype=bias_dtype),
    )


@define(
    "layernorm_backward(Tensor grad_y, Tensor x, Tensor? weight, ScalarType? bias_dtype, "
    "float eps) -> (Tensor, Tensor, Tensor)",
    _backward_fake,
)
def _backward(grad_y, x, weight, bias_dtype, eps):
    x, x_stride = as_rows(x)
    grad_y, grad_y_stride = as_rows(grad_y)
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows, columns = num_rows(x), x.shape[-1]
    dtypes = (None if weight is None else weight.dtype, bias_dtype)
    if rows == 0:
        return grad_x, *(_absent(x) if d is None else x.new_zeros(columns, dtype=d) for d in dtypes)
    settings = settings_of("layernorm.backward", x, rows)
    partials = [
        _absent(x) if d is None else x.new_empty((settings.programs, columns), dtype=torch.float32)
        for d in dtypes
    ]
    _backward_kernel[(settings.programs,)](
        grad_y,
        x,
        weight,
        grad_x,
        *partials,
        grad_y_stride,
        x_stride,
        rows,
        columns,
        eps,
        HAS_WEIGHT=weight is not None,
        HAS_BIAS=bias_dtype is not None,
        BLOCK_ROWS=settings.block_rows,
        BLOCK=settings.block_columns,
        num_warps=settings.num_warps,
    )
    sums = (
        _absent(x) if dtype is None else sum_partials(partial, dtype)
        for partial, dtype in zip(partials, dtypes, strict=True)
    )
    return grad_x, *sums


def _absent(x):
    return x.new_empty(0)
