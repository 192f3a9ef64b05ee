"""What crosses between the processes of a tensor-parallel group, with its gradient.

Source: Shoeybi et al. 2019, section 3 (arXiv:1909.08053) for `copy_in` and `sum_out`; Korthikanti et
al. 2022, section 4.2 (arXiv:2205.05198) for `gather_in` and `scatter_out`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Functional collectives: a compiler traces them, and they are in torch under these names only.
_OPS = torch.ops._c10d_functional


@dataclass(frozen=True, slots=True)
class Group:
    """The processes that share each matrix."""

    name: str
    """As torch knows the process group."""
    size: int
    """Processes."""
    rank: int
    """Number of this one, from 0."""

    def all_reduce(self, x: Tensor, op: str = "sum") -> Tensor:
        """Combine a tensor over the processes by "sum" or "max"; `x` stays, no gradient."""
        return _OPS.wait_tensor(_OPS.all_reduce(x.contiguous(), op, self.name))

    def all_gather(self, x: Tensor, dim: int) -> Tensor:
        """Put the parts of all processes together along a dim; no gradient."""
        parts = _OPS.all_gather_into_tensor(x.contiguous(), self.size, self.name)
        parts = _OPS.wait_tensor(parts)
        return parts if dim == 0 else torch.cat(parts.chunk(self.size), dim=dim)

    def reduce_scatter(self, x: Tensor, dim: int) -> Tensor:
        """Sum over the processes, and keep this one's part along a dim; no gradient."""
        if dim != 0:
            x = torch.cat(x.chunk(self.size, dim=dim))
        part = _OPS.reduce_scatter_tensor(x.contiguous(), "sum", self.size, self.name)
        return _OPS.wait_tensor(part)

    def part(self, x: Tensor, dim: int) -> Tensor:
        """Return this process's part of a dim, which the number of processes divides."""
        length = x.shape[dim] // self.size
        return x.narrow(dim, self.rank * length, length)


def copy_in(x: Tensor, group: Group) -> Tensor:
    """Hand `x`, which all have, to a part of the work; its gradients are summed."""
    return _Pair.apply(x, _same, group.all_reduce)


def sum_out(x: Tensor, group: Group) -> Tensor:
    """Sum shares of a result, after which all have it; each gets its whole gradient."""
    return _Pair.apply(x, group.all_reduce, _same)


def average_within(x: Tensor, group: Group) -> Tensor:
    """Average what each has of its part, for the work of all parts; so are the gradients."""
    return _Pair.apply(x, _Averaged(group), _Averaged(group))


def gather_in(x: Tensor, group: Group, *, dim: int = 1) -> Tensor:
    """Hand parts of a sequence, together, to a part of the work; their gradients are summed."""
    return _Pair.apply(x, _Along(group, "all_gather", dim), _Along(group, "reduce_scatter", dim))


def scatter_out(x: Tensor, group: Group, *, dim: int = 1) -> Tensor:
    """Sum shares of a result and keep a part of the sequence; each gets its whole gradient."""
    return _Pair.apply(x, _Along(group, "reduce_scatter", dim), _Along(group, "all_gather", dim))


def gather_whole(x: Tensor, group: Group, *, dim: int = 1) -> Tensor:
    """Put parts together for work that all do whole, so that their gradients are equal."""
    return _Pair.apply(x, _Along(group, "all_gather", dim), _Along(group, "part", dim))


def part_out(x: Tensor, group: Group, *, dim: int = 1) -> Tensor:
    """Keep a part of what all have; each gets its whole gradient."""
    return _Pair.apply(x, _Along(group, "part", dim), _Along(group, "all_gather", dim))


def share_gradient(x: Tensor, group: Group) -> Tensor:
    """Return `x`, which all computed whole, with a gradient that adds up to one over them."""
    # A copy, not a view: a block hands it on, and such results must be no views.
    return _Pair.apply(x, torch.clone, _Divided(group.size))


def silent(x: Tensor) -> Tensor:
    """Return zeros with the gradient of `x`: for what another process adds."""
    return _Pair.apply(x, torch.zeros_like, _same)


# Compared as objects: Dynamo of torch before 2.15 asks for a hash before there are values.
@dataclass(frozen=True, slots=True, eq=False)
class _Along:
    group: Group
    method: str
    dim: int

    def __call__(self, x: Tensor) -> Tensor:
        match self.method:
            case "all_gather":
                return self.group.all_gather(x, self.dim)
            case "reduce_scatter":
                return self.group.reduce_scatter(x, self.dim)
            case _:
                return self.group.part(x, self.dim).contiguous()


@dataclass(frozen=True, slots=True, eq=False)
class _Divided:
    size: int

    def __call__(self, x: Tensor) -> Tensor:
        return x / self.size


@dataclass(frozen=True, slots=True, eq=False)
class _Averaged:
    group: Group

    def __call__(self, x: Tensor) -> Tensor:
        return self.group.all_reduce(x) / self.group.size


class _Pair(torch.autograd.Function):
    """A linear map and its transpose."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, go: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor]
    ) -> Tensor:
        ctx.back = back
        return go(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride] # one output, one gradient
        return ctx.back(grad), None, None


def _same(x: Tensor) -> Tensor:
    return x.view_as(x)
