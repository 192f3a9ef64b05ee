"""What crosses between the processes that share the experts of a layer: tokens, there and back.

Source: Lepikhin et al. 2020, section 3.1 (arXiv:2006.16668), without capacities: no token is
dropped, and messages are as long as the choices make them.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Functional collectives are in torch under these names only.
_OPS = torch.ops._c10d_functional


class Receipt(NamedTuple):
    """How tokens were sent, to bring their results back."""

    order: Tensor
    """Which choice each row sent belongs to, int64 (T * k)."""
    position: Tensor
    """At which row each choice was sent, int64 (T * k)."""
    top_k: int
    """Choices of a token."""
    sent: list[int]
    """Rows to each process."""
    received: list[int]
    """Rows from each process."""


class Dispatched(NamedTuple):
    """Tokens where their experts are, one row for each choice."""

    x: Tensor
    """Shape (T', H)."""
    weights: Tensor
    """Shape (T', 1)."""
    indices: Tensor
    """Number of the expert among those that are here, int64 (T', 1)."""
    receipt: Receipt


@dataclass(frozen=True, slots=True)
class Exchange:
    """The processes that share the experts of a layer, in order."""

    name: str
    """As torch knows the process group."""
    size: int
    """Processes."""
    experts: int
    """Experts of each process."""

    def dispatch(self, x: Tensor, weights: Tensor, indices: Tensor) -> Dispatched:
        """Send each token to the processes of its experts; every process calls it.

        The host waits for the device once, to learn how long messages are; the backward pass does
        not wait, and a recomputed forward pass waits again.

        Args:
            x: Tokens, shape (T, H); T may differ between processes and be 0.
            weights: Of each choice, shape (T, k).
            indices: Chosen among all experts, shape (T, k).

        Returns:
            What came, by process and then by expert; it may be nothing.
        """
        choices = indices.reshape(-1)
        by_expert, order = torch.sort(choices, stable=True)
        position = torch.empty_like(order).scatter_(
            0, order, torch.arange(order.numel(), device=order.device)
        )
        bounds = torch.arange(self.size * self.experts + 1, device=choices.device)
        counts = torch.searchsorted(by_expert, bounds.to(by_expert.dtype)).diff()
        counts = counts.view(self.size, self.experts)
        even = [1] * self.size
        arriving = self._exchange(counts, even, even)
        sent, received = torch.stack((counts.sum(1), arriving.sum(1))).tolist()
        receipt = Receipt(order, position, indices.shape[-1], sent, received)
        local = torch.arange(self.experts, device=choices.device).repeat(self.size)
        numbers = local.repeat_interleave(arriving.flatten(), output_size=sum(received))
        return Dispatched(
            _Send.apply(x, self, receipt),
            _SendWeights.apply(weights.reshape(-1, 1), self, receipt),
            numbers.unsqueeze(-1),
            receipt,
        )

    def combine(self, y: Tensor, receipt: Receipt) -> Tensor:
        """Bring results back and add up those of a token; every process calls it.

        Args:
            y: One row for each that came, shape (T', H), weighted.
            receipt: From `dispatch`.

        Returns:
            Shape (T, H), dtype of `y`; sums are taken in at least fp32.
        """
        return _Return.apply(y, self, receipt)

    def send(self, rows: Tensor, receipt: Receipt) -> Tensor:
        """Send rows in the order of `receipt` to their processes: (T * k, ...) to (T', ...)."""
        return self._exchange(rows, receipt.sent, receipt.received)

    def send_back(self, rows: Tensor, receipt: Receipt) -> Tensor:
        """Send what came back to where it came from: (T', ...) to (T * k, ...)."""
        return self._exchange(rows, receipt.received, receipt.sent)

    def _exchange(self, rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
        result = _OPS.all_to_all_single(rows.contiguous(), received, sent, self.name)
        return _OPS.wait_tensor(result)


def _add_choices(rows: Tensor, receipt: Receipt) -> Tensor:
    """Add up the rows of each token: (T * k, H), in the order sent, to (T, H)."""
    wide = rows[receipt.position].unflatten(0, (-1, receipt.top_k))
    compute = torch.promote_types(rows.dtype, torch.float32)
    return wide.sum(dim=1, dtype=compute).to(rows.dtype)


# Written out, since gradients of an indexing are added up by atomics or by sorting.
class _Send(torch.autograd.Function):
    """Tokens to experts; gradients of a token's copies are added up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, exchange: Exchange, receipt: Receipt) -> Tensor:
        ctx.exchange, ctx.receipt = exchange, receipt
        return exchange.send(x[receipt.order // receipt.top_k], receipt)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride] # one output, one gradient
        return _add_choices(ctx.exchange.send_back(grad, ctx.receipt), ctx.receipt), None, None


class _SendWeights(torch.autograd.Function):
    """Weights of choices, (T * k, 1), to experts."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, exchange: Exchange, receipt: Receipt) -> Tensor:
        ctx.exchange, ctx.receipt = exchange, receipt
        return exchange.send(weights[receipt.order], receipt)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride] # one output, one gradient
        return ctx.exchange.send_back(grad, ctx.receipt)[ctx.receipt.position], None, None


class _Return(torch.autograd.Function):
    """Results to tokens, those of one token added up."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, exchange: Exchange, receipt: Receipt) -> Tensor:
        ctx.exchange, ctx.receipt = exchange, receipt
        return _add_choices(exchange.send_back(y, receipt), receipt)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride] # one output, one gradient
        rows = grad[ctx.receipt.order // ctx.receipt.top_k]
        return ctx.exchange.send(rows, ctx.receipt), None, None
