"""Linear layer and divergence from a teacher's top classes, in plain torch, a chunk at a time."""

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


def fused_linear_topk_kl_div(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    teacher_idx: Tensor,
    teacher_logprob: Tensor,
    options: DivergenceOptions,
    accumulate: torch.dtype,
) -> Tensor:
    task = Task(_evaluate, scaled, options, accumulate)
    return linear_loss(x, weight, labels, task, teacher_idx, teacher_logprob)


def topk_divergence(
    scores: Tensor, log_partition: Tensor, log_q: Tensor, options: DivergenceOptions
) -> tuple[Tensor, Tensor, Tensor]:
    """Divergence over the known classes, as a function of their scores and the log-partition.

    Args:
        scores: The student's scores of the known classes, shape (n, K).
        log_partition: The logarithm of its sum over all classes, shape (n,).
        log_q: The teacher's log-probabilities, shape (n, K), minus infinity where there is none.
        options: `direction`, `beta` and `tail`.

    Returns:
        The divergence, shape (n,), and its gradients by `scores` and `log_partition`.
    """
    nothing = log_q == -torch.inf
    if options.tail == "renormalise":
        some = ~nothing.all(dim=-1)
        # A row without entries would be 0 / 0: it is worked out as if uniform, and left out.
        nothing = nothing & some.unsqueeze(-1)
        log_q = log_q.where(some.unsqueeze(-1), 0.0)
        log_p = torch.log_softmax(scores.masked_fill(nothing, -torch.inf), dim=-1)
        losses, slope = divergence(log_p, torch.log_softmax(log_q, dim=-1), options)
        of_scores = slope - log_p.exp() * slope.sum(dim=-1, keepdim=True)
        return (
            losses.where(some, 0.0),
            of_scores.where(some.unsqueeze(-1), 0.0),
            torch.zeros_like(losses),
        )
    log_p = (scores - log_partition.unsqueeze(-1)).masked_fill(nothing, -torch.inf)
    if options.tail == "ignore":
        losses, slope = divergence(log_p, log_q, options)
        return losses, slope, -slope.sum(dim=-1)
    p, known = log_p.exp(), log_p.shape[-1]
    known_p = p.sum(dim=-1, keepdim=True)
    # What is left after rounding; its logarithm must exist.
    least = torch.finfo(p.dtype).eps
    rest_p = (1.0 - known_p).clamp(min=least)
    rest_q = (1.0 - log_q.exp().sum(dim=-1, keepdim=True)).clamp(min=least)
    losses, slope = divergence(
        torch.cat([log_p, rest_p.log()], dim=-1), torch.cat([log_q, rest_q.log()], dim=-1), options
    )
    of_rest = slope[:, known:] / rest_p
    of_partition = (of_rest * known_p).squeeze(-1) - slope[:, :known].sum(dim=-1)
    return losses, slope[:, :known] - of_rest * p, of_partition


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
    labels, teacher_idx, teacher_logprob = others
    dtype = compute_dtype(x.dtype)

    def head(
        logits: Tensor, rows: slice, row_weights: Tensor | None, factor: float, wanted: bool
    ) -> tuple[Tensor, Tensor | None]:
        valid = labels[rows] != options.ignore_index
        log_q = teacher_logprob[rows].to(dtype)
        chosen = teacher_idx[rows].where(log_q > -torch.inf, 0).to(torch.int64)
        scores = logits.to(dtype) / options.temperature
        log_partition = torch.logsumexp(scores, dim=-1)
        at_chosen = scores.gather(-1, chosen)
        losses, of_scores, of_partition = topk_divergence(at_chosen, log_partition, log_q, options)
        losses = losses.where(valid, 0.0)
        if not wanted:
            return losses, None
        share = valid.to(dtype) if row_weights is None else row_weights.where(valid, 0.0)
        share = (share * (factor / options.temperature)).unsqueeze(-1)
        grad = torch.exp(scores - log_partition.unsqueeze(-1))
        grad *= of_partition.where(valid, 0.0).unsqueeze(-1) * share
        grad.scatter_add_(-1, chosen, of_scores.where(valid.unsqueeze(-1), 0.0) * share)
        return losses, grad.to(logits.dtype)

    return evaluate(head, x, weight, weights, needs_x, needs_weight, accumulate, gain)
