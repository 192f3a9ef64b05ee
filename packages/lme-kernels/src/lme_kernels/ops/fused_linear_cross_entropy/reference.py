"""Linear layer and cross-entropy in plain torch, a chunk of rows at a time."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lme_kernels.ops.cross_entropy.options import LossOptions
from lme_kernels.ops.cross_entropy.reference import bounded, reduced
from lme_kernels.precision import compute_dtype

# Logits of one chunk, in elements: 64 MiB in float32, 512 rows of a vocabulary of 32768.
CHUNK_ELEMENTS = 1 << 24


def fused_linear_cross_entropy(
    x: Tensor, weight: Tensor, labels: Tensor, options: LossOptions, accumulate: torch.dtype
) -> Tensor:
    losses = _RowLosses.apply(x, weight, labels, options, accumulate)
    return reduced(losses, labels != options.ignore_index, options.reduction)


class _RowLosses(torch.autograd.Function):
    """Losses by row, shape (T,); the backward makes the logits again."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        labels: Tensor,
        options: LossOptions,
        accumulate: torch.dtype,
    ) -> Tensor:
        losses = torch.empty(x.shape[0], dtype=compute_dtype(x.dtype), device=x.device)
        log_partition = torch.empty_like(losses)
        for rows in _chunks(x.shape[0], weight.shape[0]):
            scores = _scores(x[rows], weight, options)
            valid = labels[rows] != options.ignore_index
            partition = torch.logsumexp(scores, dim=-1)
            at_label = scores.gather(-1, labels[rows].where(valid, 0).unsqueeze(-1)).squeeze(-1)
            chunk = partition - (1.0 - options.label_smoothing) * at_label
            if options.label_smoothing:
                chunk = chunk - options.label_smoothing * scores.mean(dim=-1)
            if options.z_loss:
                chunk = chunk + options.z_loss * partition.square()
            losses[rows] = chunk.where(valid, 0.0)
            log_partition[rows] = partition
        ctx.save_for_backward(x, weight, labels, log_partition)
        ctx.options, ctx.accumulate = options, accumulate
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_losses: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, labels, log_partition = ctx.saved_tensors
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        grad_x = torch.empty_like(x) if needs_x else None
        accumulate = torch.promote_types(ctx.accumulate, weight.dtype)
        grad_weight = (
            torch.zeros(weight.shape, dtype=accumulate, device=weight.device)
            if needs_weight
            else None
        )
        valid = labels != ctx.options.ignore_index
        grad_losses = grad_losses.where(valid, 0.0)
        for rows in _chunks(x.shape[0], weight.shape[0]):
            grad_logits = _grad_logits(
                _scores(x[rows], weight, ctx.options),
                labels[rows].where(valid[rows], 0),
                log_partition[rows],
                grad_losses[rows],
                ctx.options,
            ).to(x.dtype)
            if grad_x is not None:
                grad_x[rows] = grad_logits @ weight
            if grad_weight is not None:
                grad_weight += _product(grad_logits.t(), x[rows], accumulate)
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        return grad_x, grad_weight, None, None, None


def _chunks(T: int, V: int) -> list[slice]:
    rows = max(1, CHUNK_ELEMENTS // max(V, 1))
    return [slice(start, min(start + rows, T)) for start in range(0, T, rows)]


def _scores(x: Tensor, weight: Tensor, options: LossOptions) -> Tensor:
    return bounded((x @ weight.t()).to(compute_dtype(x.dtype)), options)


def _grad_logits(
    scores: Tensor, labels: Tensor, log_partition: Tensor, grad: Tensor, options: LossOptions
) -> Tensor:
    V = scores.shape[-1]
    factor = 1.0 + 2.0 * options.z_loss * log_partition
    grad_scores = torch.exp(scores - log_partition.unsqueeze(-1)) * factor.unsqueeze(-1)
    if options.label_smoothing:
        grad_scores -= options.label_smoothing / V
    share = torch.full_like(log_partition, options.label_smoothing - 1.0).unsqueeze(-1)
    grad_scores.scatter_add_(-1, labels.unsqueeze(-1), share)
    if options.softcap is not None:
        grad_scores *= 1.0 - (scores / options.softcap).square()
    return grad_scores * (grad * options.logit_scale).unsqueeze(-1)


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `a @ b` in `dtype`, rounded no earlier."""
    if a.dtype == dtype:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=dtype)
    return a.to(dtype) @ b.to(dtype)
