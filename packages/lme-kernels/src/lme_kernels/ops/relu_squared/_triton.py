"""Squared rectifier in Triton."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from lme_kernels._triton_elements import as_matrices, block_of_program, launch_shape
from lme_kernels._triton_launch import thin_launch
from lme_kernels.custom_ops import define
from lme_kernels.device import why_not_triton as why_not

__all__ = ["relu_squared", "why_not"]


def relu_squared(x: Tensor) -> Tensor:
    return _ReluSquared.apply(x)


class _ReluSquared(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return _forward(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):
        (x,) = ctx.saved_tensors
        return _backward(grad_y, x)


@thin_launch
@triton.jit(do_not_specialize=["blocks"])
def _forward_kernel(x_ptr, y_ptr, x_stride, columns, blocks, BLOCK: tl.constexpr):
    row, start = block_of_program(blocks, BLOCK)
    column = tl.arange(0, BLOCK)
    mask = column < columns - start
    x = tl.load(x_ptr + (row * x_stride + start) + column, mask=mask, other=0.0).to(tl.float32)
    # Not `maximum`, which would turn a NaN into 0.
    positive = tl.where(x < 0.0, 0.0, x)
    tl.store(y_ptr + (row * columns + start) + column, positive * positive, mask=mask)


@thin_launch
@triton.jit(do_not_specialize=["blocks"])
def _backward_kernel(
    grad_y_ptr, x_ptr, grad_x_ptr, grad_y_stride, x_stride, columns, blocks, BLOCK: tl.constexpr
):
    row, start = block_of_program(blocks, BLOCK)
    column = tl.arange(0, BLOCK)
    mask = column < columns - start
    grad_start = grad_y_ptr + (row * grad_y_stride + start)
    x_start = x_ptr + (row * x_stride + start)
    grad = tl.load(grad_start + column, mask=mask, other=0.0).to(tl.float32)
    x = tl.load(x_start + column, mask=mask, other=0.0).to(tl.float32)
    grad_x = 2.0 * tl.where(x < 0.0, 0.0, x) * grad
    tl.store(grad_x_ptr + (row * columns + start) + column, grad_x, mask=mask)


def _forward_fake(x):
    return x.new_empty(x.shape)


@define("relu_squared_forward(Tensor x) -> Tensor", _forward_fake)
def _forward(x):
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return y
    (x,), strides, rows, columns = as_matrices(x)
    grid, blocks, block, num_warps = launch_shape(rows, columns)
    _forward_kernel[grid](x, y, *strides, columns, blocks, BLOCK=block, num_warps=num_warps)
    return y


def _backward_fake(grad_y, x):
    return x.new_empty(x.shape)


@define("relu_squared_backward(Tensor grad_y, Tensor x) -> Tensor", _backward_fake)
def _backward(grad_y, x):
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return grad_x
    (grad_y, x), strides, rows, columns = as_matrices(grad_y, x)
    grid, blocks, block, num_warps = launch_shape(rows, columns)
    _backward_kernel[grid](
        grad_y, x, grad_x, *strides, columns, blocks, BLOCK=block, num_warps=num_warps
    )
    return grad_x
