"""Gated linear unit of a packed tensor in CUDA C++."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lme_kernels._cuda_rows import RowKernel, why_not
from lme_kernels.custom_ops import define
from lme_kernels.ops.swiglu._cuda import backward_into, forward_into
from lme_kernels.strides import as_rows, num_rows

__all__ = ["swiglu_packed", "why_not"]

FILE = "ops/swiglu_packed/_cuda.cu"
FORWARD = RowKernel(FILE, "swiglu_packed_forward", (16, 8), steps=4)
BACKWARD = RowKernel(FILE, "swiglu_packed_backward", (8, 16, 16), steps=2)


def swiglu_packed(x: Tensor, layout: str) -> Tensor:
    return _SwiGLUPacked.apply(x, layout)


class _SwiGLUPacked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: str) -> Tensor:
        ctx.save_for_backward(x)
        ctx.layout = layout
        return _forward(x, layout)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (x,) = ctx.saved_tensors
        return _backward(grad_y, x, ctx.layout), None


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    columns = x.shape[-1] // 2
    return x[..., :columns], x[..., columns:]


def _forward_fake(x: Tensor, layout: str) -> Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


@define("swiglu_packed_cuda_forward(Tensor x, str layout) -> Tensor", _forward_fake)
def _forward(x: Tensor, layout: str) -> Tensor:
    columns = x.shape[-1] // 2
    y = torch.empty((*x.shape[:-1], columns), dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    if layout == "concatenated":
        forward_into(*_halves(x), y)
        return y
    x, x_stride = as_rows(x)
    strides, rows = (x_stride, columns), num_rows(x)
    if x.is_contiguous():
        # Pairs follow each other across rows: one long row.
        strides, rows, columns = (0, 0), 1, y.numel()
    FORWARD.launch((x, y), strides, rows, columns)
    return y


def _backward_fake(grad_y: Tensor, x: Tensor, layout: str) -> Tensor:
    return x.new_empty(x.shape)


@define(
    "swiglu_packed_cuda_backward(Tensor grad_y, Tensor x, str layout) -> Tensor", _backward_fake
)
def _backward(grad_y: Tensor, x: Tensor, layout: str) -> Tensor:
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return grad_x
    if layout == "concatenated":
        backward_into(grad_y, *_halves(x), *_halves(grad_x), stride=x.shape[-1])
        return grad_x
    x, x_stride = as_rows(x)
    grad_y, grad_y_stride = as_rows(grad_y)
    rows, columns = num_rows(x), x.shape[-1] // 2
    strides = (grad_y_stride, x_stride, 2 * columns)
    if x.is_contiguous() and grad_y.is_contiguous():
        strides, rows, columns = (0, 0, 0), 1, grad_y.numel()
    BACKWARD.launch((grad_y, x, grad_x), strides, rows, columns)
    return grad_x
