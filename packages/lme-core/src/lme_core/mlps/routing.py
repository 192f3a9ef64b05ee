"""Routers: which experts a token goes to, with which weights, and how evenly."""

from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lme_core.layers.initialization import Constant, Normal, ParameterSpec
from lme_kernels.ops.continuous_count import CONTINUOUS_COUNT
from lme_kernels.ops.router_topk import ROUTER_TOPK
from lme_kernels.policy import KernelPolicy

Score = Literal["softmax", "sigmoid"]

# Keeps the weights of a token finite where all its scores are zero.
_TINY = 1e-20


class Routing(NamedTuple):
    """The experts of each token."""

    logits: Tensor
    """Shape (B, S, E), in at least float32."""
    weights: Tensor
    """Shape (B, S, k), in at least float32."""
    indices: Tensor
    """int64, shape (B, S, k)."""


class Router(nn.Module):
    """A linear layer that scores experts, and the choice of the best."""

    selection_bias: Tensor | None
    """Added to the scores to choose experts, not to weigh them; saved with the model, changed by
    `lme_core.training.experts` once a step. `None` without."""

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        k: int,
        *,
        score: Score,
        normalize: bool,
        scale: float,
        groups: tuple[int, int] | None,
        with_bias: bool,
        std: float,
        kernels: KernelPolicy,
    ) -> None:
        """Allocate without initialising.

        Args:
            hidden_size: Width of the tokens.
            num_experts: Number of experts E.
            k: Experts of a token.
            score: What a logit becomes.
            normalize: Whether a token's weights add up to one before `scale`.
            scale: Factor of the weights.
            groups: Number of groups that the experts form in order, and of those that a token's
                experts may come from.
            with_bias: Whether there is a bias for choosing.
            std: Standard deviation of the initial weights.
            kernels: Which implementations run.
        """
        super().__init__()
        self.k = k
        self.score: Score = score
        self.normalize = normalize
        self.scale = scale
        self.groups = groups
        self.std = std
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.register_buffer("selection_bias", torch.empty(num_experts) if with_bias else None)
        self.topk = kernels.bind(ROUTER_TOPK)

    def parameter_specs(self) -> Mapping[str, ParameterSpec]:
        """Spec of `weight`."""
        return {"weight": ParameterSpec(Normal(self.std), mup=True)}

    def buffer_specs(self) -> Mapping[str, ParameterSpec]:
        """Spec of `selection_bias`, where there is one."""
        return {} if self.selection_bias is None else {"selection_bias": ParameterSpec(Constant(0))}

    def forward(self, x: Tensor) -> Routing:
        """Choose experts.

        Args:
            x: Tokens, shape (B, S, H).
        """
        compute = torch.promote_types(x.dtype, torch.float32)
        logits = F.linear(x.to(compute), self.weight.to(compute))
        if self.groups is None:
            weights, indices = self.topk(
                logits, self.k, score=self.score, normalize=self.normalize, bias=self.selection_bias
            )
        else:
            weights, indices = self._from_groups(logits, *self.groups)
        return Routing(logits, weights if self.scale == 1.0 else weights * self.scale, indices)

    def _from_groups(self, logits: Tensor, groups: int, kept: int) -> tuple[Tensor, Tensor]:
        """Choose among the experts of the best groups.

        Source: DeepSeek-AI 2024 (arXiv:2405.04434, section 2.2.2: a group is as good as its best
        expert) for softmax, and (arXiv:2412.19437, section 2.1.2: as its best two) for sigmoid.
        """
        scores = scores_of(logits, self.score)
        rank = scores.detach()
        if self.selection_bias is not None:
            rank = rank + self.selection_bias.to(rank.dtype)
        grouped = rank.unflatten(-1, (groups, -1))
        best = min(1 if self.score == "softmax" else 2, grouped.shape[-1])
        of_groups = grouped.topk(best, dim=-1).values.sum(dim=-1)
        chosen = _first(of_groups, kept)
        closed = torch.ones_like(of_groups, dtype=torch.bool).scatter(-1, chosen, False)
        rank = grouped.masked_fill(closed.unsqueeze(-1), float("-inf")).flatten(-2)
        indices = _first(rank, self.k)
        weights = scores.gather(-1, indices)
        if self.normalize:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + _TINY)
        return weights, indices

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Router":
        before = self.selection_bias
        super()._apply(fn, recurse)
        after = self.selection_bias
        # Steps of the bias are smaller than bfloat16 can add: it stays float32 in any model.
        if before is not None and after is not None and after.dtype != before.dtype:
            kept = torch.promote_types(after.dtype, torch.float32)
            self.selection_bias = before.to(device=after.device, dtype=kept)
        return self


class Balance(NamedTuple):
    """How evenly the tokens of a batch went to experts, and what unevenness costs."""

    aux_loss: Tensor
    """0-d, E * sum_e f_e P_e of each sequence, summed over sequences; k = 1 and even: 1 each."""
    z_loss: Tensor
    """0-d, mean over tokens of the squared log-partition of the logits, summed over sequences."""
    counts: Tensor
    """Choices by expert, shape (E,), float32."""
    entropy: Tensor
    """Entropy of the normalised scores in nats, summed over tokens, 0-d."""
    tokens: Tensor
    """Number of tokens, 0-d, float32."""


class Balancer(nn.Module):
    """Measures a routing by sequence; without parameters."""

    reduce_counts: Callable[[Tensor], Tensor]
    """Sums a tensor (B, ...) over the devices that hold parts of the same B sequences; gradients
    pass. Public so that sequences cut over devices can be served by another function."""
    parts: int = 1
    """Devices that do so. Each gives as large a share of the losses, so that they add up to one."""

    def __init__(self, score: Score, kernels: KernelPolicy) -> None:
        """Take the router's score.

        Args:
            score: What a logit becomes.
            kernels: Which implementations run.
        """
        super().__init__()
        self.score: Score = score
        self.count = kernels.bind(CONTINUOUS_COUNT)
        self.reduce_counts = _as_it_is

    def forward(self, routing: Routing, valid: Tensor | None) -> Balance:
        """Measure.

        Args:
            routing: Of B sequences.
            valid: bool, (B, S), which tokens count; `None` for all.

        Returns:
            Sums over the batch. Losses are means over the valid tokens of each sequence first: a
            sequence means the same in any batch.

        Source: Fedus et al. 2021, equations 4 to 6 (arXiv:2101.03961), by sequence as in DeepSeek-AI
        2024, equations 17 to 20 (arXiv:2412.19437); Zoph et al. 2022, equation 5 (arXiv:2202.08906).
        """
        logits, indices = routing.logits, routing.indices
        B, _, E = logits.shape
        k = indices.shape[-1]
        shares = scores_of(logits, self.score)
        if self.score == "sigmoid":
            shares = shares / (shares.sum(dim=-1, keepdim=True) + _TINY)
        partition = logits.logsumexp(dim=-1)
        rows = torch.arange(B, device=logits.device)[:, None, None]
        bins = indices + rows * E
        if valid is None:
            tokens = torch.full((B, 1), logits.shape[1], dtype=shares.dtype, device=logits.device)
            of_sequences = shares.sum(dim=1)
            z = partition.square().sum(dim=1, keepdim=True)
        else:
            inside = valid.to(shares.dtype)
            tokens = inside.sum(dim=1, keepdim=True)
            of_sequences = (shares * inside.unsqueeze(-1)).sum(dim=1)
            z = (partition.square() * inside).sum(dim=1, keepdim=True)
            # A bin that does not exist counts nothing.
            bins = bins.masked_fill(~valid.unsqueeze(-1), -1)
        local = self.count(bins, B * E).view(B, E).to(shares.dtype)
        sums = self.reduce_counts(torch.cat((of_sequences, z, local, tokens), dim=-1))
        of_sequences, z, counts, tokens = sums.split((E, 1, E, 1), dim=-1)
        tokens = tokens.clamp(min=1)
        aux_loss = E * ((counts / (k * tokens)) * (of_sequences / tokens)).sum() / self.parts
        z_loss = (z / tokens).sum() / self.parts
        with torch.no_grad():
            entropy = torch.special.entr(shares).sum(dim=-1)
            entropy = (entropy if valid is None else entropy * valid).sum()
        counts, seen = local.sum(dim=0).float(), local.sum().float() / k
        return Balance(aux_loss, z_loss, counts, entropy, seen)


def scores_of(logits: Tensor, score: Score) -> Tensor:
    """Turn logits into scores between 0 and 1.

    Args:
        logits: Shape (..., E).
        score: "softmax" over the experts, or each logit's "sigmoid".
    """
    return logits.softmax(dim=-1) if score == "softmax" else logits.sigmoid()


def _first(values: Tensor, count: int) -> Tensor:
    """Indices of the highest, of equal ones the lower index first, as `router_topk` chooses."""
    return values.sort(dim=-1, descending=True, stable=True).indices[..., :count]


def _as_it_is(counts: Tensor) -> Tensor:
    return counts
