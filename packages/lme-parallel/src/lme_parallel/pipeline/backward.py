"""The backward pass of one stage: of all at once, or first of inputs and later of parameters."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(slots=True)
class Pass:
    """What a stage keeps of a micro batch between its forward and its backward pass."""

    inputs: tuple[Tensor, ...]
    """Leaves from the stage before."""
    outputs: tuple[Tensor, ...]
    """What the next stage reads."""
    loss: Tensor
    """This stage's own share of the loss, 0-d: all of it, or auxiliary losses of its layers."""
    weights: Any = field(default=None)  # torch's
    """Where the gradients of parameters start, once those of inputs are there."""
    graph: Any = field(default=None)  # torch's
    """Keeps the nodes of that graph: before torch 2.15 those of an `autograd.Function` are lost with
    the nodes that read from them, whoever else still holds them."""

    def root(self, gradients: Sequence[Tensor]) -> Tensor:
        """Return a number whose backward pass is that of the stage.

        Args:
            gradients: Of those outputs that have one.
        """
        outputs = [each for each in self.outputs if each.requires_grad]
        if not outputs:
            return self.loss
        rest = _WithGradients.apply(self.loss.new_zeros(()), tuple(gradients), *outputs)
        return self.loss + rest

    def input_gradients(self) -> list[Tensor]:
        """Return and drop the gradients of inputs that have one; zeros where nothing read them."""
        found = [
            torch.zeros_like(each) if each.grad is None else each.grad
            for each in self.inputs
            if each.requires_grad
        ]
        for each in self.inputs:
            each.grad = None
        return found


class _WithGradients(torch.autograd.Function):
    """A zero that hands known gradients to tensors of another process's computation."""

    @staticmethod
    def forward(ctx: Any, zero: Tensor, gradients: tuple[Tensor, ...], *outputs: Tensor) -> Tensor:
        """Return zero."""
        ctx.save_for_backward(*gradients)
        return zero.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride] # one output, one gradient
        """Hand on; they already are those of what is minimised."""
        return (None, None, *ctx.saved_tensors)


def backward_input(kept: Pass, root: Tensor, parameters: Sequence[nn.Parameter]) -> None:
    """Compute the gradients of a stage's inputs, and keep what those of parameters need.

    Args:
        kept: Of the micro batch.
        root: From `Pass.root`.
        parameters: Of the stage.
    """
    from torch.distributed.pipelining._backward import (  # noqa: PLC0415 (slow to load)
        stage_backward_input,
    )

    # Torch 2.9 refuses inputs that nothing read.
    read = _leaves_below(root)
    # A node of torch's own, which owns what is below it.
    root = root.clone()
    kept.graph = root.grad_fn
    inputs = [each for each in kept.inputs if each.requires_grad and id(each) in read]
    _, kept.weights = stage_backward_input(
        [root], [torch.ones_like(root)], inputs, iter(parameters)
    )
    kept.outputs = ()


@dataclass(frozen=True, slots=True)
class WeightsPass:
    """Stands for a loss whose backward pass is that of a stage's parameters."""

    kept: Pass
    parameters: Sequence[nn.Parameter]

    def backward(self) -> None:
        """Add the gradients to the parameters, as a backward pass would, with its hooks."""
        from torch.distributed.pipelining._backward import (  # noqa: PLC0415 (slow to load)
            stage_backward_weight,
        )

        before = [each.grad for each in self.parameters]
        for each in self.parameters:
            each.grad = None
        stage_backward_weight(iter(self.parameters), self.kept.weights)
        self.kept.weights = self.kept.graph = None
        found = [each.grad for each in self.parameters]
        for each, gradient in zip(self.parameters, before, strict=True):
            each.grad = gradient
        pairs = [
            (each, gradient)
            for each, gradient in zip(self.parameters, found, strict=True)
            if gradient is not None
        ]
        if pairs:
            torch.autograd.backward([each for each, _ in pairs], [each for _, each in pairs])


def _leaves_below(root: Tensor) -> set[int]:
    """Return the identities of the leaves that a tensor was computed from."""
    return {id(each.variable) for each in _nodes(root) if hasattr(each, "variable")}


def _nodes(root: Tensor) -> Iterator[Any]:  # torch's
    seen, waiting = set(), [root.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        waiting += [each for each, _ in node.next_functions]
