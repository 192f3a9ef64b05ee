"""First values, fp32 parameters, an objective and data for the tiny model.

For tests: of this package, and of layouts in others.
"""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor, nn

from lme_parallel.shards import Region
from lme_parallel.tiny import IGNORED, VOCABULARY, Batch, Outputs


class InitialValues:
    """First values of a model by name and region, and how many elements were asked for."""

    def __init__(self, shapes: Mapping[str, Sequence[int]]) -> None:
        self._shapes = shapes
        self.elements: dict[str, int] = {}

    def __call__(self, name: str, region: Region | None) -> Tensor:
        """Return values in fp32: numbers of the name and of the place in the whole."""
        shape = self._shapes[name]
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        values = torch.randn(tuple(shape), generator=generator) * 0.3
        values += 1.0 if name.endswith(("norm.weight", "scale.weight")) else 0.0
        part = values if region is None else values[region]
        self.elements[name] = self.elements.get(name, 0) + prod(part.shape)
        return part


class TinyMasters:
    """fp32 parameters behind a model that computes in a lower precision."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self._copies = dict(model.named_parameters())
        self._masters = {n: nn.Parameter(p.detach().clone()) for n, p in self._copies.items()}
        for each in self._copies.values():
            each.data = each.data.to(dtype)

    def named_parameters(self) -> Mapping[str, nn.Parameter]:
        """Return the masters."""
        return self._masters

    def collect_gradients(self) -> None:
        """Add the copies' gradients to the masters' and clear them."""
        for name, copy in self._copies.items():
            if copy.grad is not None:
                known, new = self._masters[name].grad, copy.grad.float()
                self._masters[name].grad = new if known is None else known + new
                copy.grad = None

    @torch.no_grad()
    def refresh(self) -> None:
        """Renew the copies."""
        for name, copy in self._copies.items():
            copy.copy_(self._masters[name])


@dataclass(frozen=True, slots=True)
class Term:
    """A further loss."""

    total: Tensor
    per: str
    weight: float


@dataclass(frozen=True, slots=True)
class Sums:
    """Sums over a batch."""

    total: Tensor
    targets: Tensor
    extras: Mapping[str, Term] = field(default_factory=dict)


class TinyObjective:
    """Cross entropy, an auxiliary loss per sequence, and one that is only logged."""

    def counts(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return targets and sequences."""
        labels = batch["labels"]
        targets = (labels != IGNORED).sum()
        sequences = torch.full_like(targets, labels.shape[0])
        return {"targets": targets, "sequences": batch.get("sequences", sequences)}

    def forward(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Outputs:
        """Call the model."""
        return model(batch)

    def loss(self, outputs: Outputs, batch: Mapping[str, Tensor]) -> Sums:
        """Return sums over the batch."""
        extras = {
            "size": Term(outputs.auxiliary["size"], "sequences", 0.25),
            "logged": Term(outputs.nll_sum * 2, "targets", 0.0),
        }
        return Sums(outputs.nll_sum, self.counts(batch)["targets"], extras)


def global_batches(step: int, count: int, *, rows: int = 2, length: int = 6) -> list[Batch]:
    """Make all micro batches of a step, over all ranks: ragged, and some without a target.

    Args:
        step: Number of the step.
        count: Micro batches; number m * W + r is micro batch m of rank r of W.
        rows: Sequences of each.
        length: Tokens of a sequence.

    Returns:
        Batches; of four in a row one has no target at all.
    """
    generator = torch.Generator().manual_seed(100 + step)
    made = []
    for number in range(count):
        ids = torch.randint(VOCABULARY, (rows, length), generator=generator)
        labels = torch.randint(VOCABULARY, (rows, length), generator=generator)
        labels[torch.rand((rows, length), generator=generator) < 0.4] = IGNORED
        if number % 4 == 1:
            labels[:] = IGNORED
        first = number * rows * length
        index = torch.arange(first, first + rows * length).view(rows, length)
        key = torch.tensor(12345 + step)
        made.append({"input_ids": ids, "labels": labels, "token_index": index, "dropout_key": key})
    return made
