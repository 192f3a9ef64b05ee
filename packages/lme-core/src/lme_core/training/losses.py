"""Losses from logits, summed over target tokens, without a second copy of the logits in fp32."""

from typing import Any, Literal

import torch
from torch import Tensor

IGNORED = -100
"""Label of a position that is no target."""

# Rows of logits turned into fp32 probabilities at once: 1024 rows of 128k logits are 0.5 GiB.
_ROWS = 1024


class _NLLAndDivergence(torch.autograd.Function):
    """Both sums in one pass over chunks of rows; the backward pass computes the chunks again."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, student: Tensor, teacher: Tensor, labels: Tensor, method: str
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(student.dtype, torch.float32)
        nll = torch.zeros((), dtype=dtype, device=student.device)
        divergence = torch.zeros_like(nll)
        for rows in _chunks(labels):
            log_p, log_q, targets, valid = _chunk(student, teacher, labels, rows, dtype)
            picked = log_p.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
            nll -= (picked * valid).sum()
            divergence += (_divergence(log_p, log_q, method) * valid).sum()
        ctx.save_for_backward(student, teacher, labels)
        ctx.method = method
        return nll, divergence

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad_nll: Tensor, grad_divergence: Tensor
    ) -> tuple[Tensor, None, None, None]:
        student, teacher, labels = ctx.saved_tensors
        dtype = torch.promote_types(student.dtype, torch.float32)
        gradient = torch.empty_like(student)
        for rows in _chunks(labels):
            log_p, log_q, targets, valid = _chunk(student, teacher, labels, rows, dtype)
            p = log_p.exp()
            if ctx.method == "forward":
                rate = log_p - log_q
                of_divergence = p * (rate - (p * rate).sum(dim=-1, keepdim=True))
            else:
                of_divergence = p - log_q.exp()
            total = grad_nll * p + grad_divergence * of_divergence
            total.scatter_add_(
                -1, targets.unsqueeze(-1), -grad_nll.to(dtype).expand(targets.shape[0], 1)
            )
            gradient[rows] = (total * valid.unsqueeze(-1)).to(student.dtype)
        return gradient, None, None, None


def nll_and_divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    method: Literal["forward", "backward"],
) -> tuple[Tensor, Tensor]:
    """Sum the negative log likelihood and the divergence from the teacher over target tokens.

    Args:
        student_logits: Shape (..., V).
        teacher_logits: Shape (..., V); no gradient flows to it.
        labels: Shape (...), int64; -100 marks positions that count in neither sum.
        method: forward: KL(student || teacher); backward: KL(teacher || student).

    Returns:
        Both sums in nats, 0-d, in at least fp32. Probabilities are taken in at least fp32.

    Raises:
        ValueError: If the vocabularies differ.

    Source: Kullback and Leibler 1951; the names of the methods are those of the run file.
    """
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            "teacher and student must share a vocabulary: their logits have shapes "
            f"{tuple(teacher_logits.shape)} and {tuple(student_logits.shape)}"
        )
    V = student_logits.shape[-1]
    nll, divergence = _NLLAndDivergence.apply(  # pyright: ignore[reportGeneralTypeIssues]
        student_logits.reshape(-1, V),
        teacher_logits.detach().reshape(-1, V),
        labels.reshape(-1),
        method,
    )
    return nll, divergence


def _chunks(labels: Tensor) -> list[slice]:
    return [slice(start, start + _ROWS) for start in range(0, labels.shape[0], _ROWS)]


def _chunk(
    student: Tensor, teacher: Tensor, labels: Tensor, rows: slice, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    log_p = student[rows].to(dtype).log_softmax(dim=-1)
    log_q = teacher[rows].to(dtype).log_softmax(dim=-1)
    valid = labels[rows] != IGNORED
    return log_p, log_q, labels[rows].clamp(min=0), valid.to(dtype)


def _divergence(log_p: Tensor, log_q: Tensor, method: str) -> Tensor:
    if method == "forward":
        return (log_p.exp() * (log_p - log_q)).sum(dim=-1)
    return (log_q.exp() * (log_q - log_p)).sum(dim=-1)
