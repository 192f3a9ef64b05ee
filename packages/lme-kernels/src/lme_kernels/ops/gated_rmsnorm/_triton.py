"""Gated root mean square normalisation in Triton: a row stays in registers."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from lme_kernels._triton_glu import activation, activation_slope
from lme_kernels._triton_launch import thin_launch
from lme_kernels._triton_rows import as_rows, num_rows, settings_of, sum_partials, why_not_rows
from lme_kernels.custom_ops import define
from lme_kernels.device import why_not_triton
from lme_kernels.tuning import ceil_div


def why_not(x: Tensor, gate: Tensor, weight: Tensor | None) -> str | None:
    return why_not_triton(x, gate, weight) or why_not_rows(x)


def gated_rmsnorm(
    x: Tensor, gate: Tensor, weight: Tensor | None, eps: float, norm_before_gate: bool
) -> Tensor:
    return _GatedRMSNorm.apply(x, gate, weight, eps, norm_before_gate)


class _GatedRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gate, weight, eps, norm_before_gate):
        ctx.save_for_backward(x, gate, weight)
        ctx.eps, ctx.norm_before_gate = eps, norm_before_gate
        return _forward(x, gate, weight, eps, norm_before_gate)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):
        x, gate, weight = ctx.saved_tensors
        grad_x, grad_gate, grad_weight = _backward(
            grad_y, x, gate, weight, ctx.eps, ctx.norm_before_gate
        )
        return grad_x, grad_gate, None if weight is None else grad_weight, None, None


@thin_launch
@triton.jit(do_not_specialize=["rows"])
def _forward_kernel(
    x_ptr,
    gate_ptr,
    weight_ptr,
    y_ptr,
    x_stride,
    gate_stride,
    rows,
    columns,
    eps,
    HAS_WEIGHT: tl.constexpr,
    NORM_BEFORE_GATE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS).to(tl.int64)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    mask = (row < rows) & (column < columns)
    y = tl.load(x_ptr + row * x_stride + column, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * gate_stride + column, mask=mask, other=0.0).to(tl.float32)
    opening = activation(gate, "silu")
    if not NORM_BEFORE_GATE:
        y *= opening
    y *= tl.rsqrt(tl.sum(y * y, axis=1, keep_dims=True) / columns + eps)
    if HAS_WEIGHT:
        y *= tl.load(weight_ptr + column, mask=column < columns, other=0.0).to(tl.float32)
    if NORM_BEFORE_GATE:
        y *= opening
    tl.store(y_ptr + row * columns + column, y, mask=mask)


@thin_launch
@triton.jit(do_not_specialize=["rows"])
def _backward_kernel(
    grad_y_ptr,
    x_ptr,
    gate_ptr,
    weight_ptr,
    grad_x_ptr,
    grad_gate_ptr,
    partial_ptr,
    grad_y_stride,
    x_stride,
    gate_stride,
    rows,
    columns,
    eps,
    HAS_WEIGHT: tl.constexpr,
    NORM_BEFORE_GATE: tl.constexpr,
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
        gate = tl.load(gate_ptr + row * gate_stride + column, mask=mask, other=0.0)
        gate = gate.to(tl.float32)
        grad = tl.load(grad_y_ptr + row * grad_y_stride + column, mask=mask, other=0.0)
        grad = grad.to(tl.float32)
        opening = activation(gate, "silu")
        slope = activation_slope(gate, "silu")
        # `normed` is what was normalised, over its root mean square.
        normed = x if NORM_BEFORE_GATE else x * opening
        inverse_rms = tl.rsqrt(tl.sum(normed * normed, axis=1, keep_dims=True) / columns + eps)
        normed *= inverse_rms
        if NORM_BEFORE_GATE:
            grad_gate = grad * normed * slope
            if HAS_WEIGHT:
                grad_gate *= weight
            grad *= opening
        if HAS_WEIGHT:
            grad_weight += grad * normed
            grad *= weight
        along = tl.sum(grad * normed, axis=1, keep_dims=True) / columns
        grad_x = (grad - normed * along) * inverse_rms
        if not NORM_BEFORE_GATE:
            grad_gate = grad_x * x * slope
            grad_x *= opening
        tl.store(grad_x_ptr + row * columns + column, grad_x, mask=mask)
        tl.store(grad_gate_ptr + row * columns + column, grad_gate, mask=mask)
    if HAS_WEIGHT:
        offset = tl.program_id(0).to(tl.int64) * columns + tl.arange(0, BLOCK)
        partial = tl.sum(grad_weight, axis=0)
        tl.store(partial_ptr + offset, partial, mask=tl.arange(0, BLOCK) < columns)


def _forward_fake(x, gate, weight, eps, norm_before_gate):
    return x.new_empty(x.shape)


@define(
    "gated_rmsnorm_forward(Tensor x, Tensor gate, Tensor? weight, float eps, "
    "bool norm_before_gate) -> Tensor",
    _forward_fake,
)
def _forward(x, gate, weight, eps, norm_before_gate):
    x, x_stride = as_rows(x)
    gate, gate_stride = as_rows(gate)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows, columns = num_rows(x), x.shape[-1]
    if rows == 0:
        return y
    settings = settings_of("gated_rmsnorm.forward", x, rows)
    _forward_kernel[(ceil_div(rows, settings.block_rows),)](
        x,
        gate,
        weight,
        y,
        x_stride,
        gate_stride,
        rows,
        columns,
        eps,
        HAS_WEIGHT=weight is not None,
        NORM_BEFORE_GATE=norm_before_gate,
        BLOCK_ROWS=settings.block_rows,
        BLOCK=settings.block_columns,
        num_warps=settings.num_warps,
    )
    return y


def _backward_fake(grad_y, x, gate, weight, eps, norm_before_gate):
    grad_weight = x.new_empty(0) if weight is None else torch.empty_like(weight)
    return x.new_empty(x.shape), x.new_empty(x.shape), grad_weight


@define(
    "gated_rmsnorm_backward(Tensor grad_y, Tensor x, Tensor gate, Tensor? weight, float eps, "
    "bool norm_before_gate) -> (Tensor, Tensor, Tensor)",
    _backward_fake,
)
def _backward(grad_y, x, gate, weight, eps, norm_before_gate):
    x, x_stride = as_rows(x)
    gate, gate_stride = as_rows(gate)
    grad_y, grad_y_stride = as_rows(grad_y)
    grad_x, grad_gate = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    rows, columns = num_rows(x), x.shape[-1]
    if rows == 0:
        return grad_x, grad_gate, x.new_empty(0) if weight is None else weight.new_zeros(columns)
    settings = settings_of("gated_rmsnorm.backward", x, rows)
    num_partials = 0 if weight is None else settings.programs
    partials = torch.empty((num_partials, columns), dtype=torch.float32, device=x.device)
    _backward_kernel[(settings.programs,)](
        grad_y,
        x,
        gate,
        weight,
        grad_x,
        grad_gate,
        partials,
        grad_y_stride,
        x_stride,
        gate_stride,
        rows,
        columns,
        eps,
        HAS_WEIGHT=weight is not None,
        NORM_BEFORE_GATE=norm_before_gate,
        BLOCK_ROWS=settings.block_rows,
        BLOCK=settings.block_columns,
        num_warps=settings.num_warps,
    )
    grad_weight = x.new_empty(0) if weight is None else sum_partials(partials, weight.dtype)
    return grad_x, grad_gate, grad_weight
