"""What crosses between the processes of a context group, with its gradient."""

from typing import Any

import torch
from torch import Tensor

from lme_parallel.context.layout import Layout
from lme_parallel.tensor.collectives import Group

# Functional collectives: a compiler traces them, and they are in torch under these names only.
_OPS = torch.ops._c10d_functional


def gather(x: Tensor, group: Group) -> Tensor:
    """Collect a tensor of every process; gradients of all go back and are added up.

    Args:
        x: The same shape everywhere.
        group: The processes.

    Returns:
        Shape (W, *x.shape), by rank.
    """
    return _Gather.apply(x, group)


def add_up(x: Tensor, group: Group) -> Tensor:
    """Sum a tensor over the processes; gradients of all go back and are added up."""
    return _AddUp.apply(x, group)


def to_contiguous(x: Tensor, layout: Layout, group: Group) -> Tensor:
    """Exchange balanced pieces for neighbouring ones.

    Args:
        x: Shape (B, C, ...), pieces r and 2W - 1 - r.
        layout: Balanced.
        group: The processes.

    Returns:
        Shape (B, C, ...), pieces 2r and 2r + 1.
    """
    return _Rearrange.apply(x, layout, group, True)


def from_contiguous(x: Tensor, layout: Layout, group: Group) -> Tensor:
    """Undo `to_contiguous`."""
    return _Rearrange.apply(x, layout, group, False)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return group.all_gather(x[None], 0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride] # one output, one gradient
        return ctx.group.reduce_scatter(grad, 0)[0], None


class _AddUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return group.all_reduce(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride] # one output, one gradient
        return ctx.group.all_reduce(grad), None


class _Rearrange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: Layout, group: Group, contiguous: bool) -> Tensor:
        ctx.layout, ctx.group, ctx.contiguous = layout, group, contiguous
        return _rearranged(x, layout, group, contiguous)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride] # one output, one gradient
        return _rearranged(grad, ctx.layout, ctx.group, not ctx.contiguous), None, None, None


def _rearranged(x: Tensor, layout: Layout, group: Group, contiguous: bool) -> Tensor:
    """Send each piece to whom it belongs, in one message to each."""
    rank, balanced = layout.rank, layout.pieces()
    neighbours = (2 * rank, 2 * rank + 1)
    have, want = (balanced, neighbours) if contiguous else (neighbours, balanced)

    def home(piece: int) -> int:
        return piece // 2 if contiguous else layout.owner(piece)

    def source(piece: int) -> int:
        return layout.owner(piece) if contiguous else piece // 2

    pieces = dict(zip(have, x.chunk(2, dim=1), strict=True))
    # Of two pieces for one process the earlier goes first.
    sent = sorted(have, key=lambda piece: (home(piece), piece))
    received = sorted(want, key=lambda piece: (source(piece), piece))
    message = torch.stack([pieces[piece] for piece in sent])
    homes, sources = [home(each) for each in sent], [source(each) for each in received]
    arrived = _OPS.all_to_all_single(
        message,
        [sources.count(each) for each in range(layout.size)],
        [homes.count(each) for each in range(layout.size)],
        group.name,
    )
    arrived = _OPS.wait_tensor(arrived)
    return torch.cat([arrived[received.index(piece)] for piece in want], dim=1)
