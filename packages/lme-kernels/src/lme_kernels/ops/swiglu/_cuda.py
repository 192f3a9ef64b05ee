"""Gated linear unit with SiLU in CUDA C++."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lme_kernels._cuda_rows import RowKernel, why_not
from lme_kernels.custom_ops import define
from lme_kernels.strides import as_matrices, as_rows, num_rows

__all__ = ["backward_into", "forward_into", "swiglu", "why_not"]

FILE = "ops/swiglu/_cuda.cu"
FORWARD = RowKernel(FILE, "swiglu_forward", (16,) * 3, steps=2)
BACKWARD = RowKernel(FILE, "swiglu_backward", (16,) * 5, steps=2)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return _SwiGLU.apply(gate, up)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return _forward(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        gate, up = ctx.saved_tensors
        return _backward(grad_y, gate, up)


def forward_into(gate: Tensor, up: Tensor, y: Tensor) -> None:
    """Launch the forward into `y`, contiguous; the tensors are not empty."""
    (gate, up), strides, rows, columns = as_matrices(gate, up)
    FORWARD.launch((gate, up, y), (*strides, columns if rows > 1 else 0), rows, columns)


def backward_into(
    grad_y: Tensor,
    gate: Tensor,
    up: Tensor,
    grad_gate: Tensor,
    grad_up: Tensor,
    stride: int | None = None,
) -> None:
    """Launch the backward; the tensors are not empty.

    Args:
        grad_y: Gradient of the result.
        gate: Input of the activation.
        up: Factor.
        grad_gate: Gets the gradient of `gate`; rows of unit stride.
        grad_up: Gets the gradient of `up`, likewise.
        stride: Elements from row to row of both; `None` if they are contiguous.
    """
    if stride is None:
        inputs, strides, rows, columns = as_matrices(grad_y, gate, up)
        stride = columns if rows > 1 else 0
    else:
        pairs = [as_rows(each) for each in (grad_y, gate, up)]
        inputs, strides = [each for each, _ in pairs], [each for _, each in pairs]
        rows, columns = num_rows(gate), gate.shape[-1]
    BACKWARD.launch((*inputs, grad_gate, grad_up), (*strides, stride), rows, columns)


def _forward_fake(gate: Tensor, up: Tensor) -> Tensor:
    return gate.new_empty(gate.shape)


@define("swiglu_cuda_forward(Tensor gate, Tensor up) -> Tensor", _forward_fake)
def _forward(gate: Tensor, up: Tensor) -> Tensor:
    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if y.numel():
        forward_into(gate, up, y)
    return y


def _backward_fake(grad_y: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


@define(
    "swiglu_cuda_backward(Tensor grad_y, Tensor gate, Tensor up) -> (Tensor, Tensor)",
    _backward_fake,
)
def _backward(grad_y: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    grad_gate, grad_up = (
        torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) for _ in range(2)
    )
    if gate.numel():
        backward_into(grad_y, gate, up, grad_gate, grad_up)
    return grad_gate, grad_up
