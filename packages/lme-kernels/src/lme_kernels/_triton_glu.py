"""Gated linear units in Triton: one kernel forward, one backward, for every activation."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lme_kernels._triton_elements import as_matrices, block_of_program, launch_shape
from lme_kernels._triton_launch import thin_launch


@triton.jit
def activation(x, ACTIVATION: tl.constexpr):
    """Activation of a gate, in float32."""
    if ACTIVATION == "silu":
        y = x * tl.sigmoid(x)
    else:
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    return y


@triton.jit
def activation_slope(x, ACTIVATION: tl.constexpr):
    """Derivative of `activation`, in float32."""
    if ACTIVATION == "silu":
        sigmoid = tl.sigmoid(x)
        slope = sigmoid * (1.0 + x * (1.0 - sigmoid))
    else:
        density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
        slope = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * density
    return slope


@thin_launch
@triton.jit(do_not_specialize=["blocks"])
def _forward_kernel(
    gate_ptr,
    up_ptr,
    y_ptr,
    gate_stride,
    up_stride,
    columns,
    blocks,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, start = block_of_program(blocks, BLOCK)
    column = tl.arange(0, BLOCK)
    mask = column < columns - start
    gate_start = gate_ptr + (row * gate_stride + start)
    up_start = up_ptr + (row * up_stride + start)
    gate = tl.load(gate_start + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_start + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + (row * columns + start) + column, activation(gate, ACTIVATION) * up, mask=mask)


@thin_launch
@triton.jit(do_not_specialize=["blocks"])
def _backward_kernel(
    grad_y_ptr,
    gate_ptr,
    up_ptr,
    grad_gate_ptr,
    grad_up_ptr,
    grad_y_stride,
    gate_stride,
    up_stride,
    columns,
    blocks,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, start = block_of_program(blocks, BLOCK)
    column = tl.arange(0, BLOCK)
    mask = column < columns - start
    grad_start = grad_y_ptr + (row * grad_y_stride + start)
    gate_start = gate_ptr + (row * gate_stride + start)
    up_start = up_ptr + (row * up_stride + start)
    grad = tl.load(grad_start + column, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_start + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_start + column, mask=mask, other=0.0).to(tl.float32)
    to = row * columns + start
    grad_gate = grad * up * activation_slope(gate, ACTIVATION)
    tl.store(grad_gate_ptr + to + column, grad_gate, mask=mask)
    tl.store(grad_up_ptr + to + column, grad * activation(gate, ACTIVATION), mask=mask)


def glu_forward(gate: Tensor, up: Tensor, name: str) -> Tensor:
    """Launch the forward.

    Args:
        gate: Input of the activation, any shape.
        up: Factor, shape and dtype of `gate`.
        name: Activation: "silu" or "gelu".

    Returns:
        Shape and dtype of `gate`.
    """
    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if gate.numel() == 0:
        return y
    (gate, up), strides, rows, columns = as_matrices(gate, up)
    grid, blocks, block, num_warps = launch_shape(rows, columns)
    _forward_kernel[grid](
        gate, up, y, *strides, columns, blocks, ACTIVATION=name, BLOCK=block, num_warps=num_warps
    )
    return y


def glu_backward(grad_y: Tensor, gate: Tensor, up: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Launch the backward.

    Args:
        grad_y: Gradient of the result, shape of `gate`.
        gate: Input of the activation.
        up: Factor.
        name: Activation: "silu" or "gelu".

    Returns:
        Gradients of `gate` and `up`.
    """
    grad_gate, grad_up = (
        torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) for _ in range(2)
    )
    if gate.numel() == 0:
        return grad_gate, grad_up
    (grad_y, gate, up), strides, rows, columns = as_matrices(grad_y, gate, up)
    grid, blocks, block, num_warps = launch_shape(rows, columns)
    _backward_kernel[grid](
        grad_y,
        gate,
        up,
        grad_gate,
        grad_up,
        *strides,
        columns,
        blocks,
        ACTIVATION=name,
        BLOCK=block,
        num_warps=num_warps,
    )
    return grad_gate, grad_up
