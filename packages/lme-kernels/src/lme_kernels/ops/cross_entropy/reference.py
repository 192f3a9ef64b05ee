"""Cross-entropy in plain torch."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lme_kernels.ops.cross_entropy.options import LossOptions, VocabularyShard
from lme_kernels.precision import compute_dtype


def cross_entropy(logits: Tensor, labels: Tensor, options: LossOptions) -> Tensor:
    scores = bounded(logits.to(compute_dtype(logits.dtype)), options.logit_scale, options.softcap)
    valid = labels != options.ignore_index
    log_partition, at_label, mean = _statistics(scores, labels, valid, options)
    losses = row_losses(log_partition, at_label, mean, options)
    return reduced(losses.where(valid, 0.0), valid, options.reduction)


def bounded(logits: Tensor, logit_scale: float, softcap: float | None) -> Tensor:
    """Scale logits and bound them."""
    scores = logits * logit_scale if logit_scale != 1.0 else logits
    if softcap is None:
        return scores
    return softcap * torch.tanh(scores / softcap)


def row_losses(
    log_partition: Tensor, at_label: Tensor, mean: Tensor | None, options: LossOptions
) -> Tensor:
    """Put the losses of rows together; `mean` of the scores is there if labels are smoothed."""
    losses = log_partition - (1.0 - options.label_smoothing) * at_label
    if mean is not None:
        losses = losses - options.label_smoothing * mean
    if options.z_loss:
        losses = losses + options.z_loss * log_partition.square()
    return losses


def reduced(losses: Tensor, valid: Tensor, reduction: str) -> Tensor:
    """Reduce losses of shape (...), which are 0 where `valid` is not."""
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    # As in torch, the mean over no rows is 0 / 0.
    return losses.sum() / valid.sum()


def owned_labels(labels: Tensor, V: int, shard: VocabularyShard) -> tuple[Tensor, Tensor]:
    """Return labels counted from the shard's first class, and which of them it holds."""
    local = labels.to(torch.int64) - shard.start
    owned = (local >= 0) & (local < V)
    return local.where(owned, 0), owned


def combined(
    maximum: Tensor, partition: Tensor, sums: list[Tensor], shard: VocabularyShard
) -> tuple[Tensor, list[Tensor]]:
    """Combine the statistics of the parts of a vocabulary.

    Args:
        maximum: Largest score of each row in this part, shape (T,).
        partition: Sum of `exp(score - maximum)` over this part, shape (T,).
        sums: What else is to be summed over parts, each of shape (T,).
        shard: How parts are combined.

    Returns:
        The log-partition over the whole vocabulary, and `sums` over it.
    """
    largest = shard.reduce(maximum.contiguous(), "max")
    own = partition * torch.exp(maximum - largest)
    total = shard.reduce(torch.stack([own, *sums]), "sum").unbind()
    return largest + torch.log(total[0]), list(total[1:])


def _statistics(
    scores: Tensor, labels: Tensor, valid: Tensor, options: LossOptions
) -> tuple[Tensor, Tensor, Tensor | None]:
    V, shard = scores.shape[-1], options.shard
    if shard is None:
        # An ignored row may hold any label: it reads class 0 and is masked.
        index = labels.where(valid, 0).to(torch.int64)
        at_label = scores.gather(-1, index.unsqueeze(-1)).squeeze(-1)
        mean = scores.mean(dim=-1) if options.label_smoothing else None
        return torch.logsumexp(scores, dim=-1), at_label, mean
    local, owned = owned_labels(labels, V, shard)
    at_label = scores.gather(-1, local.unsqueeze(-1)).squeeze(-1).where(owned, 0.0)
    largest = shard.reduce(scores.detach().amax(dim=-1), "max")
    own = torch.exp(scores - largest.unsqueeze(-1)).sum(dim=-1)
    sums = [own, at_label, scores.sum(dim=-1)] if options.label_smoothing else [own, at_label]
    total = _SumOverShards.apply(torch.stack(sums), shard.reduce).unbind()
    mean = total[2] / shard.size if options.label_smoothing else None
    return largest + torch.log(total[0]), total[1], mean


class _SumOverShards(torch.autograd.Function):
    """A sum whose gradient every process has whole, since all compute the same loss."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, reduce: Callable[[Tensor, str], Tensor]) -> Tensor:
        # A hook that gives its argument back would make the output an alias of the input.
        return reduce(x.clone(), "sum")

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad, None
