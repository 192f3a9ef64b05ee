"""A tiny model, objective and data that meet the seam between models and this package.

For tests: of this package, and of layouts in others.
"""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lme_parallel.shards import Region

Batch = dict[str, Tensor]
IGNORED = -100
VOCABULARY, HIDDEN, HEADS, INTERMEDIATE, LAYERS = 19, 8, 4, 12, 2


def wide(x: Tensor) -> Tensor:
    """Return `x` in at least fp32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Attention(nn.Module):
    """Causal attention; rows of `qkv` are grouped by head."""

    shard_plan: ClassVar[Mapping[str, str] | None] = {"qkv": "column", "output": "row"}

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(HIDDEN, 3 * HIDDEN, bias=True)
        self.output = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.attend = F.scaled_dot_product_attention

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, S, H) to (B, S, H)."""
        packed = self.qkv(x).unflatten(-1, (-1, 3, HIDDEN // HEADS))
        query, key, value = packed.permute(3, 0, 2, 1, 4)
        mixed = self.attend(query, key, value, is_causal=True)
        return self.output(mixed.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """A gated MLP."""

    shard_plan: ClassVar[Mapping[str, str] | None] = {"gate_up": "column", "down": "row"}

    def __init__(self) -> None:
        super().__init__()
        self.gate_up = nn.Linear(HIDDEN, 2 * INTERMEDIATE, bias=False)
        self.down = nn.Linear(INTERMEDIATE, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, S, H) to (B, S, H)."""
        gate, up = self.gate_up(x).unflatten(-1, (-1, 2)).unbind(-1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    """Attention and MLP with dropout, and an auxiliary loss per sequence."""

    def __init__(self, index: int, dropout: float) -> None:
        super().__init__()
        self.index = index
        self.dropout = dropout
        self.mixer_norm = nn.LayerNorm(HIDDEN)
        self.sequence_mixer = Attention()
        self.mlp_norm = nn.LayerNorm(HIDDEN)
        self.mlp = MLP()
        self.register_buffer("seen", torch.zeros(3))

    def forward(self, x: Tensor, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Map (B, S, H) to (B, S, H) and this layer's auxiliary loss, summed over sequences."""
        x = x + self._drop(self.sequence_mixer(self.mixer_norm(x)), batch)
        y = self.mlp(self.mlp_norm(x))
        return x + y, wide(y).square().mean((1, 2)).sum()

    def _drop(self, x: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        if not self.dropout or "dropout_key" not in batch:
            return x
        # A hash of step, layer, token and channel: the same wherever the token is.
        channel = torch.arange(x.shape[-1], device=x.device)
        state = batch["token_index"].unsqueeze(-1) * 31 + channel + 7919 * self.index
        state = (state ^ batch["dropout_key"]) * 2654435761 % 2**31
        state = (state ^ (state >> 13)) * 1103515245 % 2**31
        keep = (state % 1000) >= int(1000 * self.dropout)
        return x * keep.to(x.dtype) / (1 - self.dropout)


@dataclass(frozen=True, slots=True)
class Outputs:
    """As a model of this kind returns them; torch's containers do not know this class."""

    nll_sum: Tensor
    auxiliary: Mapping[str, Tensor]


class TinyModel(nn.Module):
    """Embedding, blocks by layer, norm, head."""

    shard_plan: ClassVar[Mapping[str, str] | None] = {"embedding": "vocab", "lm_head": "vocab"}

    def __init__(
        self, *, dropout: float = 0.0, is_tied: bool = False, layers: int = LAYERS
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, HIDDEN)
        self.blocks = nn.ModuleDict({str(i): Block(i, dropout) for i in range(layers)})
        self.final_norm = nn.LayerNorm(HIDDEN)
        self.lm_head = None if is_tied else nn.Linear(HIDDEN, VOCABULARY, bias=False)
        self.shapes = {name: tuple(each.shape) for name, each in self.named_parameters()}
        self.shapes |= {name: tuple(each.shape) for name, each in self.named_buffers()}

    def forward(self, batch: Mapping[str, Tensor]) -> Outputs:
        """Return sums over the batch."""
        x, auxiliary = self.embedding(batch["input_ids"]), []
        for block in self.blocks.values():
            x, loss = block(x, batch)
            auxiliary.append(loss)
        nll = self.head(x, batch["labels"])
        return Outputs(nll, {"size": torch.stack(auxiliary).sum()})

    def head(self, x: Tensor, labels: Tensor) -> Tensor:
        """Sum the negative log likelihood of (B, S) labels."""
        weight = self.embedding.weight if self.lm_head is None else self.lm_head.weight
        logits = F.linear(self.final_norm(x), weight).flatten(0, 1)
        return F.cross_entropy(
            wide(logits), labels.flatten(), ignore_index=IGNORED, reduction="sum"
        )


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
        values += 1.0 if name.endswith("norm.weight") else 0.0
        part = values if region is None else values[region]
        self.elements[name] = self.elements.get(name, 0) + prod(part.shape)
        return part


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
        return {"targets": targets, "sequences": torch.full_like(targets, labels.shape[0])}

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
