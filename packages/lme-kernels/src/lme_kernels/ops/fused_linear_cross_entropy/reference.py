"""Linear layer and cross-entropy in plain torch, a chunk of rows at a time."""

import torch
from torch import Tensor

from lme_kernels.ops.cross_entropy.options import LossOptions
from lme_kernels.ops.cross_entropy.reference import bounded, combined, owned_labels, row_losses
from lme_kernels.ops.fused_linear_cross_entropy.linear import (
    Evaluated,
    Task,
    evaluate,
    linear_loss,
    scaled,
)
from lme_kernels.precision import compute_dtype


def fused_linear_cross_entropy(
    x: Tensor, weight: Tensor, labels: Tensor, options: LossOptions, accumulate: torch.dtype
) -> Tensor:
    return linear_loss(x, weight, labels, Task(_evaluate, scaled, options, accumulate))


def _evaluate(
    x: Tensor,
    weight: Tensor,
    others: tuple[Tensor, ...],
    options: LossOptions,
    weights: Tensor | None,
    needs_x: bool,
    needs_weight: bool,
    accumulate: torch.dtype,
    gain: float,
) -> Evaluated:
    (labels,) = others

    def head(
        logits: Tensor, rows: slice, row_weights: Tensor | None, factor: float, wanted: bool
    ) -> tuple[Tensor, Tensor | None]:
        return _rows(logits, labels[rows], options, row_weights, factor, wanted)

    return evaluate(head, x, weight, weights, needs_x, needs_weight, accumulate, gain)


def _rows(
    logits: Tensor,
    labels: Tensor,
    options: LossOptions,
    weights: Tensor | None,
    gain: float,
    wanted: bool,
) -> tuple[Tensor, Tensor | None]:
    """Losses of some rows, and the gradient of the logits if it is wanted."""
    V = logits.shape[-1]
    smoothing = options.label_smoothing
    valid = labels != options.ignore_index
    scores = bounded(logits.to(compute_dtype(logits.dtype)), options.logit_scale, options.softcap)
    log_p, log_partition, local, owned, losses = _log_probabilities(scores, labels, valid, options)
    losses = losses.where(valid, 0.0)
    if not wanted:
        return losses, None
    factor = valid.to(scores.dtype) * (options.logit_scale * gain)
    if weights is not None:
        # An ignored row may come with any gradient, also one that is not finite.
        factor = factor * weights.where(valid, 0.0)
    grad = log_p.exp_()
    if log_partition is not None:
        grad.mul_((1.0 + 2.0 * options.z_loss * log_partition).unsqueeze(-1))
    if smoothing:
        grad.sub_(smoothing / options.classes(V))
    share = (smoothing - 1.0) * owned.to(scores.dtype)
    grad.scatter_add_(-1, local.unsqueeze(-1), share.unsqueeze(-1))
    if options.softcap is not None:
        grad.mul_(1.0 - (scores / options.softcap).square())
    return losses, grad.mul_(factor.unsqueeze(-1)).to(logits.dtype)


def _log_probabilities(
    scores: Tensor, labels: Tensor, valid: Tensor, options: LossOptions
) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor]:
    """Log-probabilities, log-partition if it is squared, labels here, which are here, losses."""
    V, shard, smoothing = scores.shape[-1], options.shard, options.label_smoothing
    if shard is None:
        # An ignored row may hold any label: it reads class 0 and is masked.
        local, owned = labels.where(valid, 0).to(torch.int64), valid
        log_p = torch.log_softmax(scores, dim=-1)
        at_label = log_p.gather(-1, local.unsqueeze(-1)).squeeze(-1)
        losses = (smoothing - 1.0) * at_label
        if smoothing:
            losses = losses - smoothing * log_p.mean(dim=-1)
        if not options.z_loss:
            return log_p, None, local, owned, losses
        log_partition = torch.logsumexp(scores, dim=-1)
        losses = losses + options.z_loss * log_partition.square()
        return log_p, log_partition, local, owned, losses
    local, owned = owned_labels(labels, V, shard)
    owned = owned & valid
    at_label = scores.gather(-1, local.unsqueeze(-1)).squeeze(-1).where(owned, 0.0)
    maximum = scores.amax(dim=-1)
    partition = torch.exp(scores - maximum.unsqueeze(-1)).sum(dim=-1)
    sums = [at_label, scores.sum(dim=-1)] if smoothing else [at_label]
    log_partition, sums = combined(maximum, partition, sums, shard)
    mean = sums[1] / shard.size if smoothing else None
    losses = row_losses(log_partition, sums[0], mean, options)
    return scores - log_partition.unsqueeze(-1), log_partition, local, owned, losses
