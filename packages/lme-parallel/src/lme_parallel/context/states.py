"""States handed from process to process, whose gradients come back."""

from typing import Any

import torch
from torch import Tensor, distributed

from lme_parallel.context.ring import Ring


def receive(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, ring: Ring) -> Tensor:
    """Wait for a state from the process before; its gradient is sent back there.

    Args:
        shape: Of the state.
        dtype: Of the state.
        device: Of the state.
        ring: The processes, of which this one is not the first.
    """
    # Something that needs a gradient, for the state to get one.
    anchor = torch.zeros((), dtype=dtype, device=device, requires_grad=torch.is_grad_enabled())
    return _Receive.apply(anchor, shape, ring)


def hand_on(y: Tensor, state: Tensor, ring: Ring) -> Tensor:
    """Send a state to the process behind; its gradient is received before that of `y` goes on.

    Args:
        y: Outputs that the loss depends on.
        state: After the tokens here.
        ring: The processes, of which this one is not the last.

    Returns:
        `y`.
    """
    return _HandOn.apply(y, state, ring)


class _Receive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, shape: tuple[int, ...], ring: Ring) -> Tensor:
        ctx.ring = ring
        state = anchor.new_empty(shape)
        distributed.recv(state, ring.neighbour(-1), group=ring.group)
        return state

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride] # one output, one gradient
        distributed.send(grad.contiguous(), ctx.ring.neighbour(-1), group=ctx.ring.group)
        return grad.new_zeros(()), None, None


class _HandOn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, state: Tensor, ring: Ring) -> Tensor:
        ctx.ring = ring
        ctx.save_for_backward(state.new_empty(0))
        ctx.shape = state.shape
        distributed.send(state.contiguous(), ring.neighbour(1), group=ring.group)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride] # one output, one gradient
        (like,) = ctx.saved_tensors
        of_state = like.new_empty(ctx.shape)
        distributed.recv(of_state, ctx.ring.neighbour(1), group=ctx.ring.group)
        return grad, of_state, None
