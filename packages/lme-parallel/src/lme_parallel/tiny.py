"""A tiny model that meets the seam between models and this package.

For tests: of this package, and of layouts in others.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Batch = dict[str, Tensor]
IGNORED = -100
VOCABULARY, HIDDEN, HEADS, INTERMEDIATE, LAYERS = 19, 8, 4, 12, 2


def wide(x: Tensor) -> Tensor:
    """Return `x` in at least fp32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def as_it_is(x: Tensor) -> Tensor:
    """Return `x`."""
    return x


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attend causally over (B, S, N, D), the last query at the last key; some options only."""
    if not causal or (window, softcap, mask, sinks) != (None, None, None, None):
        raise ValueError("the tiny model's attention is plain")
    B, S, T = *query.shape[:2], key.shape[1]
    seen = torch.ones(S, T, dtype=torch.bool, device=query.device).tril(T - S)
    if cu_seqlens is not None:
        tokens = torch.arange(B * S, device=query.device)
        document = torch.searchsorted(cu_seqlens.long(), tokens, right=True).view(B, S)
        seen = seen & (document[:, :, None] == document[:, None])[:, None]
    heads = (each.transpose(1, 2) for each in (query, key, value))
    return F.scaled_dot_product_attention(*heads, attn_mask=seen, scale=scale).transpose(1, 2)


class Scale(nn.Module):
    """Channels times numbers that all heads share."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., size) to (..., size)."""
        return x * self.weight


class Attention(nn.Module):
    """Causal attention with dropout; rows of `qkv` are grouped by head."""

    shard_plan: ClassVar[Mapping[str, str] | None] = {"qkv": "column", "output": "row"}

    def __init__(self, index: int, dropout: float) -> None:
        super().__init__()
        self.index = index
        self.dropout = dropout
        self.shard_units = {"heads": HEADS}
        self.qkv = nn.Linear(HIDDEN, 3 * HIDDEN, bias=True)
        self.query_scale = Scale(HIDDEN // HEADS)
        self.output = nn.Linear(HIDDEN, HIDDEN, bias=True)
        self.attend = attend

    def forward(self, x: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """Map (B, S, H) to (B, S, H)."""
        query, key, value = self.qkv(x).unflatten(-1, (-1, 3, HIDDEN // HEADS)).unbind(-2)
        mixed = self.attend(
            self.query_scale(query), key, value, causal=True, cu_seqlens=batch.get("cu_seqlens")
        )
        return self._drop(self.output(mixed.flatten(2)), batch)

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


class MLP(nn.Module):
    """A gated MLP, and an auxiliary loss per sequence."""

    shard_plan: ClassVar[Mapping[str, str] | None] = {"gate_up": "column", "down": "row"}

    def __init__(self) -> None:
        super().__init__()
        self.gate_up = nn.Linear(HIDDEN, 2 * INTERMEDIATE, bias=False)
        self.down = nn.Linear(INTERMEDIATE, HIDDEN, bias=False)
        self.reduce_counts = as_it_is
        self.parts = 1

    def forward(self, x: Tensor, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Map (B, S, H) to (B, S, H) and the auxiliary loss, summed over sequences."""
        gate, up = self.gate_up(x).unflatten(-1, (-1, 2)).unbind(-1)
        valid = batch.get("valid", torch.ones_like(batch["input_ids"])).unsqueeze(-1)
        cubes = wide(x).pow(3).abs() * valid
        # What a sequence adds up to may be on several processes, each of which has the whole then.
        cubes, tokens = self.reduce_counts(
            torch.cat((cubes.sum(1), valid.sum(1).to(cubes.dtype)), dim=-1)
        ).split([cubes.shape[-1], 1], dim=-1)
        return self.down(F.silu(gate) * up), (cubes / tokens).mean(-1).sum() / self.parts


class ExpertLinear(nn.Module):
    """The linear layers of all experts, with biases."""

    def __init__(self, experts: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, outputs, inputs))
        self.bias = nn.Parameter(torch.empty(experts, outputs))


class Experts(nn.Module):
    """Gated MLPs side by side."""

    shard_plan: ClassVar[Mapping[str, str] | None] = {
        "gate_up": "expert_column",
        "down": "expert_row",
    }

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.gate_up = ExpertLinear(experts, HIDDEN, 2 * INTERMEDIATE)
        self.down = ExpertLinear(experts, INTERMEDIATE, HIDDEN)
        self.fused_name = "tiny"
        self.fused = all_experts

    def forward(self, x: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        """Add up the outputs of the experts (T, k) of tokens (T, H)."""
        first, second = self.gate_up, self.down
        return self.fused(
            x,
            weights,
            indices,
            first.weight,
            first.bias,
            second.weight,
            down_bias=second.bias,
        )


def all_experts(
    x: Tensor,
    weights: Tensor,
    indices: Tensor,
    up: Tensor,
    up_bias: Tensor,
    down: Tensor,
    *,
    down_bias: Tensor,
) -> Tensor:
    """Send every token through every expert, and add up those that were chosen."""
    total = torch.zeros_like(wide(x))
    for number in range(up.shape[0]):
        gate, value = F.linear(x, up[number], up_bias[number]).unflatten(-1, (-1, 2)).unbind(-1)
        y = F.linear(F.silu(gate) * value, down[number], down_bias[number])
        share = torch.where(indices == number, weights, 0.0).sum(-1, keepdim=True)
        total = total + share * y
    return total.to(x.dtype)


class MoE(nn.Module):
    """Experts of which each token has two, and an auxiliary loss per sequence.

    Args:
        experts: How many there are.
        busy: How many of them, from the first, get tokens.
    """

    shard_plan: ClassVar[Mapping[str, str] | None] = {}

    def __init__(self, experts: int, busy: int) -> None:
        super().__init__()
        self.busy = busy
        self.router = nn.Linear(HIDDEN, experts, bias=False)
        self.experts = Experts(experts)
        self.dispatch = keep
        self.combine = give
        self.reduce_counts = as_it_is
        self.parts = 1

    def forward(self, x: Tensor, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Map (B, S, H) to (B, S, H) and the auxiliary loss, summed over sequences."""
        logits = wide(self.router(x))
        is_closed = torch.arange(logits.shape[-1], device=x.device) >= self.busy
        shares = logits.masked_fill(is_closed, -1e4).softmax(-1)
        weights, indices = shares.topk(2, -1)
        sent = self.dispatch(x.flatten(0, 1), weights.flatten(0, 1), indices.flatten(0, 1))
        y = self.combine(self.experts(sent.x, sent.weights, sent.indices), sent.receipt)
        valid = batch.get("valid", torch.ones_like(batch["input_ids"])).unsqueeze(-1)
        experts = logits.shape[-1]
        chosen = F.one_hot(indices, experts).sum(2)
        each = torch.cat((chosen, shares, torch.ones_like(shares[..., :1])), dim=-1)
        counts, sums, tokens = self.reduce_counts((each * valid).sum(1)).split(
            [experts, experts, 1], dim=-1
        )
        return y.view_as(x), (counts * sums / tokens**2).sum() / self.parts


class Sent(NamedTuple):
    """Tokens where their experts are."""

    x: Tensor
    weights: Tensor
    indices: Tensor
    receipt: Any


def keep(x: Tensor, weights: Tensor, indices: Tensor) -> Sent:
    """Leave tokens where they are."""
    return Sent(x, weights, indices, None)


def give(y: Tensor, receipt: Any) -> Tensor:
    """Leave results where they are."""
    return y


class Block(nn.Module):
    """Attention and MLP."""

    def __init__(self, index: int, dropout: float, experts: int, busy_experts: int | None) -> None:
        super().__init__()
        self.mixer_norm = nn.LayerNorm(HIDDEN)
        self.sequence_mixer = Attention(index, dropout)
        self.mlp_norm = nn.LayerNorm(HIDDEN)
        self.mlp = MoE(experts, busy_experts or experts) if experts else MLP()
        self.register_buffer("seen", torch.zeros(3))

    def forward(self, x: Tensor, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Map (B, S, H) to (B, S, H) and this layer's auxiliary loss, summed over sequences."""
        x = x + self.sequence_mixer(self.mixer_norm(x), batch)
        y, loss = self.mlp(self.mlp_norm(x), batch)
        return x + y, loss


@dataclass(frozen=True, slots=True)
class Outputs:
    """As a model of this kind returns them; torch's containers do not know this class."""

    nll_sum: Tensor
    auxiliary: Mapping[str, Tensor]


class TinyModel(nn.Module):
    """Embedding, blocks by layer, norm, head."""

    shard_plan: ClassVar[Mapping[str, str] | None] = {"embedding": "vocab", "lm_head": "vocab"}

    def __init__(
        self,
        *,
        dropout: float = 0.0,
        is_tied: bool = False,
        layers: int = LAYERS,
        experts: int = 0,
        busy_experts: int | None = None,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, HIDDEN)
        self.blocks = nn.ModuleDict(
            {str(i): Block(i, dropout, experts, busy_experts) for i in range(layers)}
        )
        self.final_norm = nn.LayerNorm(HIDDEN)
        self.lm_head = None if is_tied else nn.Linear(HIDDEN, VOCABULARY, bias=False)
        self.linear_nll = linear_nll
        self.linear_logits = F.linear
        self.shapes = {name: tuple(each.shape) for name, each in self.named_parameters()}
        self.shapes |= {name: tuple(each.shape) for name, each in self.named_buffers()}

    def forward(self, batch: Mapping[str, Tensor]) -> Outputs:
        """Return sums over the batch."""
        x, auxiliary = self.embed(batch), []
        for block in self.blocks.values():
            x, loss = block(x, batch)
            auxiliary.append(loss)
        nll = self.head(x, batch["labels"])
        return Outputs(nll, {"size": torch.stack(auxiliary).sum()})

    def part_costs(self) -> tuple[float, tuple[float, ...], float]:
        """Return the work of the parts, in elements of matrices that a token meets."""
        block = HIDDEN * (4 * HIDDEN + 3 * INTERMEDIATE)
        return HIDDEN, (block,) * len(self.blocks), HIDDEN * VOCABULARY

    def part_ends(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Return the names of the modules before the blocks, and of those after them."""
        head = "embedding" if self.lm_head is None else "lm_head"
        return ("embedding",), ("final_norm", head)

    def forward_part(
        self,
        batch: Mapping[str, Tensor],
        tensors: tuple[Tensor, ...] | None,
        layers: Sequence[int],
        *,
        is_last: bool,
    ) -> tuple[tuple[Tensor, ...], Outputs]:
        """Run some layers, with the embedding without tensors and the head at the end."""
        x = self.embed(batch) if tensors is None else tensors[0]
        auxiliary = []
        for layer in layers:
            x, loss = self.blocks[str(layer)](x, batch)
            auxiliary.append(loss)
        further = {"size": torch.stack(auxiliary).sum()}
        if is_last:
            return (), Outputs(self.head(x, batch["labels"]), further)
        return (x,), Outputs(wide(x.new_zeros(())), further)

    def embed(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Look up tokens: (B, S, H)."""
        return self.embedding(batch["input_ids"])

    def residual(self, x: Tensor) -> Tensor:
        """Return what the blocks added up."""
        return x

    def head(self, x: Tensor, labels: Tensor) -> Tensor:
        """Sum the negative log likelihood of (B, S) labels."""
        weight = self.embedding.weight if self.lm_head is None else self.lm_head.weight
        return self.linear_nll(
            self.final_norm(self.residual(x)).flatten(0, 1), weight, labels.flatten()
        )


def linear_nll(x: Tensor, weight: Tensor, labels: Tensor, *, shard: Any = None) -> Tensor:
    """Sum negative log likelihoods; `shard` says which rows of the whole `weight` are here."""
    logits = wide(F.linear(x, weight))
    if shard is None:
        return F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
    local = labels - shard.start
    is_here = (local >= 0) & (local < logits.shape[-1])
    at_label = logits.gather(-1, local.where(is_here, 0)[:, None])[:, 0].where(is_here, 0.0)
    largest = shard.reduce(logits.detach().amax(-1), "max")
    own = (logits - largest[:, None]).exp().sum(-1)
    partition, at_label = Summed.apply(torch.stack((own, at_label)), shard.reduce)
    return (largest + partition.log() - at_label).where(labels != IGNORED, 0.0).sum()


class Summed(torch.autograd.Function):
    """A sum over processes, of which each has the whole gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, reduce: Callable[[Tensor, str], Tensor]) -> Tensor:
        """Sum."""
        return reduce(x, "sum")

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride] # one output, one gradient
        """Hand on."""
        return grad, None
