"""Gated linear unit with SiLU in the Neuron Kernel Interface: not run on hardware.

Written for `neuronxcc.nki` of the Neuron compiler; tested by an emulator of the calls made here.
"""

import neuronxcc.nki as nki
import neuronxcc.nki.language as nl
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch_xla import runtime

# Rows of a tile are the partitions of on-chip memory. Up to twelve tiles are there at once, 8 KiB
# of the 192 KiB of a partition each.
ROWS = 128
COLUMNS = 2048
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def why_not(*tensors: Tensor | None) -> str | None:
    if runtime.device_type() != "NEURON":
        return f"it runs on Trainium, and torch_xla drives a device of type {runtime.device_type()}"
    for tensor in tensors:
        if tensor is not None and tensor.dtype not in DTYPES:
            return f"{tensor.dtype} is not among float32, float16 and bfloat16"
    return None


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return _SwiGLU.apply(gate, up)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        if gate.numel() == 0:
            return torch.empty_like(gate)
        return _forward_kernel(_rows(gate), _rows(up)).reshape(gate.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):
        gate, up = ctx.saved_tensors
        if gate.numel() == 0:
            return torch.empty_like(gate), torch.empty_like(up)
        gradients = _backward_kernel(_rows(grad_y), _rows(gate), _rows(up))
        return tuple(each.reshape(gate.shape) for each in gradients)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1] if x.ndim else 1).contiguous()


@nki.jit
def _forward_kernel(gate, up):
    y = nl.ndarray(gate.shape, dtype=gate.dtype, buffer=nl.shared_hbm)
    M, H = gate.shape
    row, column = nl.arange(ROWS)[:, None], nl.arange(COLUMNS)[None, :]
    for i in nl.affine_range((M + ROWS - 1) // ROWS):
        for j in nl.affine_range((H + COLUMNS - 1) // COLUMNS):
            r, c = i * ROWS + row, j * COLUMNS + column
            inside = (r < M) & (c < H)
            g = nl.load(gate[r, c], mask=inside, dtype=nl.float32)
            u = nl.load(up[r, c], mask=inside, dtype=nl.float32)
            silu = nl.multiply(g, nl.sigmoid(g, mask=inside), mask=inside)
            nl.store(y[r, c], nl.multiply(silu, u, mask=inside, dtype=gate.dtype), mask=inside)
    return y


@nki.jit
def _backward_kernel(grad_y, gate, up):
    grad_gate = nl.ndarray(gate.shape, dtype=gate.dtype, buffer=nl.shared_hbm)
    grad_up = nl.ndarray(gate.shape, dtype=gate.dtype, buffer=nl.shared_hbm)
    M, H = gate.shape
    row, column = nl.arange(ROWS)[:, None], nl.arange(COLUMNS)[None, :]
    for i in nl.affine_range((M + ROWS - 1) // ROWS):
        for j in nl.affine_range((H + COLUMNS - 1) // COLUMNS):
            r, c = i * ROWS + row, j * COLUMNS + column
            inside = (r < M) & (c < H)
            dy = nl.load(grad_y[r, c], mask=inside, dtype=nl.float32)
            g = nl.load(gate[r, c], mask=inside, dtype=nl.float32)
            u = nl.load(up[r, c], mask=inside, dtype=nl.float32)
            sigmoid = nl.sigmoid(g, mask=inside)
            silu = nl.multiply(g, sigmoid, mask=inside)
            du = nl.multiply(dy, silu, mask=inside, dtype=gate.dtype)
            nl.store(grad_up[r, c], du, mask=inside)
            # The slope of SiLU is sigmoid + silu (1 - sigmoid).
            rest = nl.subtract(1.0, sigmoid, mask=inside)
            slope = nl.add(sigmoid, nl.multiply(silu, rest, mask=inside), mask=inside)
            scaled = nl.multiply(dy, u, mask=inside)
            dg = nl.multiply(scaled, slope, mask=inside, dtype=gate.dtype)
            nl.store(grad_gate[r, c], dg, mask=inside)
    return grad_gate, grad_up
