"""Cross-entropy in plain torch."""

import torch
from torch import Tensor

from lme_kernels.ops.cross_entropy.options import LossOptions
from lme_kernels.precision import compute_dtype


def cross_entropy(logits: Tensor, labels: Tensor, options: LossOptions) -> Tensor:
    scores = bounded(logits.to(compute_dtype(logits.dtype)), options)
    valid = labels != options.ignore_index
    log_partition = torch.logsumexp(scores, dim=-1)
    # An ignored row may hold any label: it reads class 0 and is masked.
    at_label = scores.gather(-1, labels.where(valid, 0).unsqueeze(-1)).squeeze(-1)
    losses = log_partition - (1.0 - options.label_smoothing) * at_label
    if options.label_smoothing:
        losses = losses - options.label_smoothing * scores.mean(dim=-1)
    if options.z_loss:
        losses = losses + options.z_loss * log_partition.square()
    return reduced(losses.where(valid, 0.0), valid, options.reduction)


def bounded(logits: Tensor, options: LossOptions) -> Tensor:
    """Scale logits and bound them."""
    scores = logits * options.logit_scale if options.logit_scale != 1.0 else logits
    if options.softcap is None:
        return scores
    return options.softcap * torch.tanh(scores / options.softcap)


def reduced(losses: Tensor, valid: Tensor, reduction: str) -> Tensor:
    """Reduce losses of shape (...), which are 0 where `valid` is not."""
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    return losses.sum() / valid.sum().clamp(min=1)
