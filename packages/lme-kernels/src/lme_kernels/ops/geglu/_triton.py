"""Gated linear unit with the exact GELU in Triton."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lme_kernels._triton_glu import glu_backward, glu_forward
from lme_kernels.custom_ops import define
from lme_kernels.device import why_not_triton as why_not

__all__ = ["geglu", "why_not"]


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    return _GeGLU.apply(gate, up)


class _GeGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return _forward(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):
        gate, up = ctx.saved_tensors
        return _backward(grad_y, gate, up)


def _forward_fake(gate, up):
    return gate.new_empty(gate.shape)


@define("geglu_forward(Tensor gate, Tensor up) -> Tensor", _forward_fake)
def _forward(gate, up):
    return glu_forward(gate, up, "gelu")


def _backward_fake(grad_y, gate, up):
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


@define("geglu_backward(Tensor grad_y, Tensor gate, Tensor up) -> (Tensor, Tensor)", _backward_fake)
def _backward(grad_y, gate, up):
    return glu_backward(grad_y, gate, up, "gelu")
