"""A model of a few thousand parameters that meets the protocol, and a loader that counts."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

VOCABULARY, HIDDEN, LENGTH = 37, 16, 12


@dataclass
class TinyOutputs:
    logits: Tensor | None
    nll_sum: Tensor | None
    auxiliary: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class TinyTraits:
    weight_decay: bool
    mup: bool


class TinyModel(nn.Module):
    """Embedding tied to the head, a mixing layer with a bias, a buffer, dropout by key."""

    def __init__(self, *, dropout: bool = False, auxiliary: bool = False, seed: int = 0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.embedding = nn.Embedding(VOCABULARY, HIDDEN)
        self.up = nn.Linear(HIDDEN, 2 * HIDDEN)
        self.down = nn.Linear(2 * HIDDEN, HIDDEN, bias=False)
        self.head = nn.Linear(HIDDEN, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("scale", torch.tensor(1.25))
        self.register_buffer("table", torch.arange(4.0), persistent=False)
        self.dropout, self.auxiliary = dropout, auxiliary
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)

    def initial_value(self, name: str, region: object) -> Tensor:
        generator = torch.Generator().manual_seed(len(name))
        shapes = {name: p.shape for name, p in self.named_parameters()}
        shapes |= {name: b.shape for name, b in self.named_buffers()}
        return torch.randn(shapes[name], generator=generator)

    def forward(self, batch, *, logits=True):
        x = self.embedding(batch["input_ids"])
        y = F.silu(self.up(x.cumsum(dim=1))) * self.scale.to(x.dtype)
        if self.dropout and "dropout_key" in batch:
            channel = torch.arange(y.shape[-1])
            index = batch["token_index"].unsqueeze(-1) * 1024 + channel + batch["dropout_key"]
            y = y * (((index * 6364136223846793005) >> 40) & 1)
        z = self.head(x + self.down(y))
        auxiliary = {}
        if self.auxiliary:
            # A sum over sequences of something that has a gradient.
            auxiliary["aux_loss"] = y.float().square().mean(dim=(1, 2)).sum()
        if logits:
            return TinyOutputs(z, None, auxiliary)
        wide = torch.promote_types(z.dtype, torch.float32)
        nll = F.cross_entropy(
            z.to(wide).flatten(0, 1), batch["labels"].flatten(), reduction="sum", ignore_index=-100
        )
        return TinyOutputs(None, nll, auxiliary)


class CountingLoader:
    """Micro batches that depend on the position only: epochs of seven, each in its own order."""

    def __init__(self, *, batch_size: int = 2, ragged: bool = False, length: int | None = None):
        self.batch_size, self.ragged, self.length = batch_size, ragged, length
        self.position = 0

    def chosen(self):
        epoch, place = divmod(self.position, 7)
        return int(torch.randperm(7, generator=torch.Generator().manual_seed(epoch))[place])

    def __next__(self):
        if self.length is not None and self.position >= self.length:
            raise StopIteration
        generator = torch.Generator().manual_seed(self.chosen())
        tokens = torch.randint(VOCABULARY, (self.batch_size, LENGTH + 1), generator=generator)
        labels = tokens[:, 1:].clone()
        if self.ragged:
            labels[torch.rand(labels.shape, generator=generator) < 0.2 * (self.position % 4)] = -100
        first = self.position * self.batch_size * LENGTH
        index = first + torch.arange(self.batch_size * LENGTH).view(self.batch_size, LENGTH)
        self.position += 1
        return {"input_ids": tokens[:, :-1].clone(), "labels": labels, "token_index": index}

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


@pytest.fixture
def tiny_model():
    return TinyModel


@pytest.fixture
def counting_loader():
    return CountingLoader


@pytest.fixture
def tiny_traits():
    """Biases are not decayed; `up` is marked for mup."""

    def traits(names):
        return {
            name: TinyTraits(weight_decay="bias" not in name, mup=name.startswith("up"))
            for name in names
        }

    return traits
