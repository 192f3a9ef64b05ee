"""Divergences between two distributions given by their log-probabilities."""

import math

import torch
from torch import Tensor

from lme_kernels.ops.fused_linear_kl_div.options import DivergenceOptions


def divergence(log_p: Tensor, log_q: Tensor, options: DivergenceOptions) -> tuple[Tensor, Tensor]:
    """Divergence of a student from a teacher, and its gradient by the student.

    Args:
        log_p: The student's log-probabilities, shape (n, classes).
        log_q: The teacher's, same shape.
        options: `direction` and `beta`.

    Returns:
        The divergence of each row in nats, shape (n,), and its gradient by `log_p` as if its
        entries were independent, shape (n, classes). A class without probability adds nothing.
    """
    p = log_p.exp()
    if options.direction == "student_teacher":
        terms = torch.where(p > 0, p * (log_p - log_q), 0.0)
        return terms.sum(dim=-1), terms + p
    q = log_q.exp()
    if options.direction == "teacher_student":
        terms = torch.where(q > 0, q * (log_q - log_p), 0.0)
        return terms.sum(dim=-1), -q
    beta = options.beta
    log_mixture = torch.logaddexp(log_q + math.log(beta), log_p + math.log1p(-beta))
    of_student = torch.where(p > 0, (1.0 - beta) * p * (log_p - log_mixture), 0.0)
    of_teacher = torch.where(q > 0, beta * q * (log_q - log_mixture), 0.0)
    return (of_student + of_teacher).sum(dim=-1), of_student
