"""Rules: which tensors of theirs make which of ours, and the exact way back.

A transform turns a list of tensors of theirs into a list of ours (`to_ours`) and back (`to_theirs`)
without arithmetic, so that both directions are exact to the bit. `to_theirs` gives views wherever
it can: that is also how shapes are checked before a byte is read. A `Rule` adds the names.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

Sizes = Mapping[str, int]
"""Sizes of one layer by name: `num_attention_heads`, `num_key_value_heads`, `head_dim`, ..."""


class Transform(Protocol):
    """An invertible rearrangement of tensors."""

    def to_ours(self, tensors: Sequence[Tensor], sizes: Sizes) -> list[Tensor]:
        """Make our tensors of theirs."""
        ...

    def to_theirs(self, tensors: Sequence[Tensor], sizes: Sizes) -> list[Tensor]:
        """Undo `to_ours`."""
        ...


@dataclass(frozen=True, slots=True)
class Rename:
    """Nothing but other names, one for one."""

    def to_ours(self, tensors: Sequence[Tensor], sizes: Sizes) -> list[Tensor]:
        return list(tensors)

    def to_theirs(self, tensors: Sequence[Tensor], sizes: Sizes) -> list[Tensor]:
        return list(tensors)


@dataclass(frozen=True, slots=True)
class Concatenate:
    """Several tensors of theirs end to end in one of ours."""

    parts: tuple[str, ...]
    """Length of each part along `dim`: names in `Sizes`."""
    dim: int = 0

    def to_ours(self, tensors: Sequence[Tensor], sizes: Sizes) -> list[Tensor]:
        for tensor, part in zip(tensors, self.parts, strict=True):
            if tensor.shape[self.dim] != sizes[part]:
                raise ValueError(
                    f"dim {self.dim} must have `{part}` = {sizes[part]} entries, "
                    f"got {tensor.shape[self.dim]}"
                )
        return [torch.cat(list(tensors), dim=self.dim)]

    def to_theirs(self, tensors: Sequence[Tensor], sizes: Sizes) -> list[Tensor]:
        (tensor,) = tensors
        return list(tensor.split([sizes[part] for part in self.parts], dim=self.dim))


@dataclass(frozen=True, slots=True)
class Stack:
    """Tensors of theirs, of one shape, along a new first dim of ours (experts)."""

    def to_ours(self, tensors: Sequence[Tensor], sizes: Sizes) -> list[Tensor]:
        return [torch.stack(list(tensors))]

    def to_theirs(self, tensors: Sequence[Tensor], sizes: Sizes) -> list[Tensor]:
        (tensor,) = tensors
        return list(tensor.unbind(0))


@dataclass(frozen=True, slots=True)
class Interleave:
    """Rows of several tensors taken in turn: of a gated MLP, even rows gate, odd rows up."""

    parts: int = 2
    dim: int = 0

    def to_ours(self, tensors: Sequence[Tensor], sizes: Sizes) -> list[Tensor]:
        if len(tensors) != self.parts:
            raise ValueError(f"{self.parts} tensors are interleaved, got {len(tensors)}")
        return [torch.stack(list(tensors), dim=self.dim + 1).flatten(self.dim, self.dim + 1)]

    def to_theirs(self, tensors: Sequence[Tensor], sizes: Sizes) -> list[Tensor]:
        (tensor,) = tensors
        return list(tensor.unflatten(self.dim, (-1, self.parts)).unbind(self.dim + 1))


@dataclass(frozen=True, slots=True)
class Alternate:
    """Equal runs of rows of one tensor taken in turn: gates, then ups, become gate, up, gate, up."""

    parts: int = 2
    dim: int = 0

    def to_ours(self, tensors: Sequence[Tensor], sizes: Sizes) -> list[Tensor]:
        return [self._exchanged(tensor, (self.parts, -1)) for tensor in tensors]

    def to_theirs(self, tensors: Sequence[Tensor], sizes: Sizes) -> list[Tensor]:
        return [self._exchanged(tensor, (-1, self.parts)) for tensor in tensors]

    def _exchanged(self, tensor: Tensor, split: tuple[int, int]) -> Tensor:
        dim = self.dim
        return tensor.unflatten(dim, split).transpose(dim, dim + 1).flatten(dim, dim + 1)


@dataclass(frozen=True, slots=True)
class GroupedQKV:
    """Query, key and value rows grouped per key-value head: [its queries, key, value], repeated.

    Theirs: query (N*D, ...), key (K*D, ...), value (K*D, ...). Ours: ((N + 2K)*D, ...).
    """

    def to_ours(self, tensors: Sequence[Tensor], sizes: Sizes) -> list[Tensor]:
        rows = self._rows(sizes)
        for name, tensor, expected in zip(("query", "key", "value"), tensors, rows, strict=True):
            if tensor.shape[0] != expected * sizes["num_key_value_heads"]:
                raise ValueError(
                    f"{name} must have {expected * sizes['num_key_value_heads']} rows, "
                    f"got {tensor.shape[0]}"
                )
        groups = sizes["num_key_value_heads"]
        parts = [tensor.unflatten(0, (groups, -1)) for tensor in tensors]
        return [torch.cat(parts, dim=1).flatten(0, 1)]

    def to_theirs(self, tensors: Sequence[Tensor], sizes: Sizes) -> list[Tensor]:
        (tensor,) = tensors
        grouped = tensor.unflatten(0, (sizes["num_key_value_heads"], -1))
        return [part.flatten(0, 1) for part in grouped.split(self._rows(sizes), dim=1)]

    def _rows(self, sizes: Sizes) -> list[int]:
        queries = sizes["num_attention_heads"] // sizes["num_key_value_heads"]
        return [queries * sizes["head_dim"], sizes["head_dim"], sizes["head_dim"]]


@dataclass(frozen=True, slots=True)
class Permute:
    """Dims in another order."""

    dims: tuple[int, ...]
    """Dim of theirs that stands at each place in ours."""

    def to_ours(self, tensors: Sequence[Tensor], sizes: Sizes) -> list[Tensor]:
        return [tensor.permute(self.dims) for tensor in tensors]

    def to_theirs(self, tensors: Sequence[Tensor], sizes: Sizes) -> list[Tensor]:
        back = [self.dims.index(dim) for dim in range(len(self.dims))]
        return [tensor.permute(back) for tensor in tensors]


@dataclass(frozen=True, slots=True)
class Inverse:
    """Another transform with its directions exchanged: one tensor of theirs split into ours."""

    of: Transform

    def to_ours(self, tensors: Sequence[Tensor], sizes: Sizes) -> list[Tensor]:
        return self.of.to_theirs(tensors, sizes)

    def to_theirs(self, tensors: Sequence[Tensor], sizes: Sizes) -> list[Tensor]:
        return self.of.to_ours(tensors, sizes)


@dataclass(frozen=True, slots=True)
class Chain:
    """Transforms one after the other, on the way to ours; in reverse on the way back."""

    steps: tuple[Transform, ...]

    def to_ours(self, tensors: Sequence[Tensor], sizes: Sizes) -> list[Tensor]:
        current = list(tensors)
        for step in self.steps:
            current = step.to_ours(current, sizes)
        return current

    def to_theirs(self, tensors: Sequence[Tensor], sizes: Sizes) -> list[Tensor]:
        current = list(tensors)
        for step in reversed(self.steps):
            current = step.to_theirs(current, sizes)
        return current


@dataclass(frozen=True, slots=True)
class InGroups:
    """One transform applied to each of several equal runs of the list of tensors."""

    transform: Transform
    groups: int

    def to_ours(self, tensors: Sequence[Tensor], sizes: Sizes) -> list[Tensor]:
        runs = self._runs(tensors)
        return [each for run in runs for each in self.transform.to_ours(run, sizes)]

    def to_theirs(self, tensors: Sequence[Tensor], sizes: Sizes) -> list[Tensor]:
        runs = self._runs(tensors)
        return [each for run in runs for each in self.transform.to_theirs(run, sizes)]

    def _runs(self, tensors: Sequence[Tensor]) -> list[Sequence[Tensor]]:
        length, rest = divmod(len(tensors), self.groups)
        if rest:
            raise ValueError(f"{len(tensors)} tensors do not make {self.groups} equal groups")
        return [tensors[start * length : (start + 1) * length] for start in range(self.groups)]


@dataclass(frozen=True, slots=True)
class Rule:
    """Tensors of theirs, tensors of ours, and the transform between them.

    Names may hold `{i}`, the layer, and those of theirs `{e}`, the expert: such a name stands for
    all experts of the layer, in order. A rule applies to the layers whose model has its tensors.
    """

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    transform: Transform = field(default_factory=Rename)
    given: str | None = None
    """Name in `Sizes` without which a layer is none of this rule's."""
    absent: str | None = None
    """Name in `Sizes` with which a layer is none of this rule's."""

    def applies(self, sizes: Sizes) -> bool:
        """Whether a layer of these sizes is this rule's, if the model has its tensors."""
        return (self.given is None or self.given in sizes) and self.absent not in sizes

    def __str__(self) -> str:
        return f"{', '.join(self.theirs)} -> {', '.join(self.ours)} by {self.transform}"


def rename(theirs: str, ours: str) -> Rule:
    """One tensor under two names."""
    return Rule((theirs,), (ours,))
