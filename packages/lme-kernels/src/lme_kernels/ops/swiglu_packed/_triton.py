"""Gated linear unit of a packed tensor in Triton."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from lme_kernels._triton_elements import block_of_program, launch_shape
from lme_kernels._triton_glu import activation, activation_slope
from lme_kernels._triton_launch import thin_launch
from lme_kernels._triton_rows import as_rows, num_rows
from lme_kernels.custom_ops import define
from lme_kernels.device import why_not_triton as why_not

__all__ = ["swiglu_packed", "why_not"]


def swiglu_packed(x: Tensor, layout: str) -> Tensor:
    return _SwiGLUPacked.apply(x, layout)


class _SwiGLUPacked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, layout):
        ctx.save_for_backward(x)
        ctx.layout = layout
        return _forward(x, layout)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):
        (x,) = ctx.saved_tensors
        return _backward(grad_y, x, ctx.layout), None


@triton.jit
def _load_pair(x_ptr, columns, start, INTERLEAVED: tl.constexpr, BLOCK: tl.constexpr):
    """Load a block of gates and one of ups from the row at `x_ptr`, in float32."""
    if INTERLEAVED:
        # One load of both, split in registers: two strided loads would move twice the sectors.
        both = tl.arange(0, 2 * BLOCK)
        mask = both < 2 * (columns - start)
        pairs = tl.load(x_ptr + 2 * start + both, mask=mask, other=0.0).to(tl.float32)
        gate, up = tl.split(tl.reshape(pairs, (BLOCK, 2)))
    else:
        column = tl.arange(0, BLOCK)
        mask = column < columns - start
        gate = tl.load(x_ptr + start + column, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(x_ptr + (columns + start) + column, mask=mask, other=0.0).to(tl.float32)
    return gate, up


@thin_launch
@triton.jit(do_not_specialize=["blocks"])
def _forward_kernel(
    x_ptr, y_ptr, x_stride, columns, blocks, INTERLEAVED: tl.constexpr, BLOCK: tl.constexpr
):
    row, start = block_of_program(blocks, BLOCK)
    gate, up = _load_pair(x_ptr + row * x_stride, columns, start, INTERLEAVED, BLOCK)
    column = tl.arange(0, BLOCK)
    y = activation(gate, "silu") * up
    tl.store(y_ptr + (row * columns + start) + column, y, mask=column < columns - start)


@thin_launch
@triton.jit(do_not_specialize=["blocks"])
def _backward_kernel(
    grad_y_ptr,
    x_ptr,
    grad_x_ptr,
    grad_y_stride,
    x_stride,
    columns,
    blocks,
    INTERLEAVED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, start = block_of_program(blocks, BLOCK)
    gate, up = _load_pair(x_ptr + row * x_stride, columns, start, INTERLEAVED, BLOCK)
    column = tl.arange(0, BLOCK)
    mask = column < columns - start
    grad_start = grad_y_ptr + (row * grad_y_stride + start)
    grad = tl.load(grad_start + column, mask=mask, other=0.0).to(tl.float32)
    grad_gate = grad * up * activation_slope(gate, "silu")
    grad_up = grad * activation(gate, "silu")
    grad_x_row = grad_x_ptr + row * (2 * columns)
    if INTERLEAVED:
        both = tl.arange(0, 2 * BLOCK)
        pairs = tl.interleave(grad_gate, grad_up)
        tl.store(grad_x_row + 2 * start + both, pairs, mask=both < 2 * (columns - start))
    else:
        tl.store(grad_x_row + start + column, grad_gate, mask=mask)
        tl.store(grad_x_row + (columns + start) + column, grad_up, mask=mask)


def _forward_fake(x, layout):
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


@define("swiglu_packed_forward(Tensor x, str layout) -> Tensor", _forward_fake)
def _forward(x, layout):
    columns = x.shape[-1] // 2
    y = torch.empty((*x.shape[:-1], columns), dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    x, x_stride = as_rows(x)
    interleaved = layout == "interleaved"
    rows = num_rows(x)
    if interleaved and x.is_contiguous():
        # Pairs follow each other across rows: one long row.
        rows, columns = 1, y.numel()
    grid, blocks, block, num_warps = launch_shape(rows, columns)
    _forward_kernel[grid](
        x, y, x_stride, columns, blocks, INTERLEAVED=interleaved, BLOCK=block, num_warps=num_warps
    )
    return y


def _backward_fake(grad_y, x, layout):
    return x.new_empty(x.shape)


@define("swiglu_packed_backward(Tensor grad_y, Tensor x, str layout) -> Tensor", _backward_fake)
def _backward(grad_y, x, layout):
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return grad_x
    x, x_stride = as_rows(x)
    grad_y, grad_y_stride = as_rows(grad_y)
    interleaved = layout == "interleaved"
    rows, columns = num_rows(x), x.shape[-1] // 2
    if interleaved and x.is_contiguous() and grad_y.is_contiguous():
        rows, columns = 1, grad_y.numel()
    grid, blocks, block, num_warps = launch_shape(rows, columns)
    _backward_kernel[grid](
        grad_y,
        x,
        grad_x,
        grad_y_stride,
        x_stride,
        columns,
        blocks,
        INTERLEAVED=interleaved,
        BLOCK=block,
        num_warps=num_warps,
    )
    return grad_x
