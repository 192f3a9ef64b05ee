"""A vocabulary cut by rows: looking tokens up, losses and logits over it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lme_parallel.tensor.collectives import Group, gather_whole, sum_out


class VocabularyPart(NamedTuple):
    """What a loss over a vocabulary takes as `shard`: the part that a process holds."""

    start: int
    """First token of this part."""
    size: int
    """Tokens of the whole vocabulary."""
    reduce: Callable[[Tensor, str], Tensor]
    """Takes a tensor and "max" or "sum"; combines it over the processes."""


@dataclass(frozen=True, slots=True)
class Lookup:
    """The forward pass of an embedding of which some rows are here."""

    embedding: nn.Embedding
    start: int
    """First row that is here."""
    group: Group

    # The name is the embedding's.
    def __call__(self, input: Tensor) -> Tensor:  # noqa: A002
        """Look up tokens.

        Args:
            input: int64, of the whole vocabulary, any shape (...).

        Returns:
            Shape (..., H), the same in all processes.
        """
        weight = self.embedding.weight
        local = input - self.start
        inside = (local >= 0) & (local < weight.shape[0])
        rows = F.embedding(local.where(inside, 0), weight)
        return sum_out(torch.where(inside.unsqueeze(-1), rows, 0.0), self.group)


@dataclass(frozen=True, slots=True)
class GatheredLogits:
    """Logits over the whole vocabulary, from a weight of which some rows are here."""

    product: Callable[[Tensor, Tensor], Tensor]
    """(x, weight) -> logits of the weight's rows."""
    size: int
    """Tokens of the whole vocabulary."""
    rows: int
    """Rows of every process but the last."""
    group: Group

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        """Multiply and gather.

        Args:
            x: Shape (..., H); its gradient is a share.
            weight: Rows that are here, shape (V', H).

        Returns:
            Shape (..., V), the same in all processes.
        """
        logits = self.product(x, weight)
        padded = F.pad(logits, (0, self.rows - logits.shape[-1]))
        last = padded.ndim - 1
        return gather_whole(padded, self.group, dim=last)[..., : self.size]
