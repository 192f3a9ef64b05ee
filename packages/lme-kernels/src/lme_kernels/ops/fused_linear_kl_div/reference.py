"""Linear layer and divergence from a teacher in plain torch, a chunk of rows at a time."""

import torch
from torch import Tensor

from lme_kernels.ops.fused_linear_cross_entropy.linear import (
    Evaluated,
    Task,
    evaluate,
    linear_loss,
    scaled,
)
from lme_kernels.ops.fused_linear_kl_div.divergence import divergence
from lme_kernels.ops.fused_linear_kl_div.options import DivergenceOptions
from lme_kernels.precision import compute_dtype


def fused_linear_kl_div(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    teacher: tuple[Tensor, ...],
    options: DivergenceOptions,
    accumulate: torch.dtype,
) -> Tensor:
    return linear_loss(x, weight, labels, Task(_evaluate, scaled, options, accumulate), *teacher)


def teacher_logits(
    teacher: tuple[Tensor, ...], options: DivergenceOptions, rows: slice, shape: torch.Size
) -> Tensor:
    """Logits of the teacher for some rows; `teacher` is hidden states and weight, or logits."""
    if options.provider is not None:
        logits = options.provider(rows)
        if logits.shape != shape:
            raise ValueError(
                f"`teacher` must return logits of shape {tuple(shape)} for rows {rows.start} to "
                f"{rows.stop}, got {tuple(logits.shape)}"
            )
        return logits.detach()
    if len(teacher) == 1:
        return teacher[0][rows]
    return teacher[0][rows] @ teacher[1].t()


def _evaluate(
    x: Tensor,
    weight: Tensor,
    others: tuple[Tensor, ...],
    options: DivergenceOptions,
    weights: Tensor | None,
    needs_x: bool,
    needs_weight: bool,
    accumulate: torch.dtype,
    gain: float,
) -> Evaluated:
    labels, *teacher = others

    def head(
        logits: Tensor, rows: slice, row_weights: Tensor | None, factor: float, wanted: bool
    ) -> tuple[Tensor, Tensor | None]:
        valid = labels[rows] != options.ignore_index
        other = teacher_logits(tuple(teacher), options, rows, logits.shape)
        dtype = compute_dtype(logits.dtype)
        log_p = torch.log_softmax(logits.to(dtype) / options.temperature, dim=-1)
        log_q = torch.log_softmax(other.to(dtype) / options.temperature, dim=-1)
        losses, slope = divergence(log_p, log_q, options)
        losses = losses.where(valid, 0.0)
        if not wanted:
            return losses, None
        grad = slope - log_p.exp() * slope.sum(dim=-1, keepdim=True)
        share = valid.to(dtype) if row_weights is None else row_weights.where(valid, 0.0)
        grad *= (share * (factor / options.temperature)).unsqueeze(-1)
        return losses, grad.to(logits.dtype)

    return evaluate(head, x, weight, weights, needs_x, needs_weight, accumulate, gain)
