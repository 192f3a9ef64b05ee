"""Kernel of the divergence between two rows of logits, and of its gradient."""

import triton
import triton.language as tl

from lme_kernels._triton_launch import thin_launch
from lme_kernels.ops.cross_entropy._triton_kernels import LOWEST, extended, scores_at

STUDENT_TEACHER = tl.constexpr(0)
TEACHER_STUDENT = tl.constexpr(1)
JSD = tl.constexpr(2)


@triton.jit
def log_of_mixture(log_p, log_q, log_beta, log_rest):
    """Logarithm of `beta q + (1 - beta) p`."""
    of_teacher = log_q + log_beta
    of_student = log_p + log_rest
    larger = tl.maximum(of_teacher, of_student)
    return larger + tl.log(1.0 + tl.exp(-tl.abs(of_teacher - of_student)))


@triton.jit
def pair_at(row_ptr, other_ptr, offsets, V, width, other_width, logit_scale):
    """Scores of both sides for a block of a row."""
    s = scores_at(row_ptr, offsets, V, width, logit_scale, 1.0, False)
    t = scores_at(other_ptr, offsets, V, other_width, logit_scale, 1.0, False)
    return s, t


@triton.jit
def pair_statistics(
    row_ptr,
    other_ptr,
    V,
    width,
    other_width,
    logit_scale,
    DIRECTION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Statistics of two rows.

    Both log-partitions; the divergence where one look at the rows gives it, else 0; and the mean
    difference of scores under the distribution that the direction names first.
    """
    columns = tl.arange(0, BLOCK)
    maximum = tl.full((BLOCK,), LOWEST, dtype=tl.float32)
    partition = tl.zeros((BLOCK,), dtype=tl.float32)
    other_maximum = tl.full((BLOCK,), LOWEST, dtype=tl.float32)
    other_partition = tl.zeros((BLOCK,), dtype=tl.float32)
    difference = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, V, BLOCK):
        s, t = pair_at(row_ptr, other_ptr, start + columns, V, width, other_width, logit_scale)
        maximum, partition, factor, term = extended(maximum, partition, s)
        other_maximum, other_partition, other_factor, other_term = extended(
            other_maximum, other_partition, t
        )
        if DIRECTION == STUDENT_TEACHER:
            difference = difference * factor + tl.where(term > 0, term * (s - t), 0.0)
        if DIRECTION == TEACHER_STUDENT:
            gap = tl.where(other_term > 0, other_term * (t - s), 0.0)
            difference = difference * other_factor + gap
    largest = tl.max(maximum, axis=0)
    decay = tl.exp(maximum - largest)
    total = tl.sum(partition * decay, axis=0)
    other_largest = tl.max(other_maximum, axis=0)
    other_decay = tl.exp(other_maximum - other_largest)
    other_total = tl.sum(other_partition * other_decay, axis=0)
    # Of the student over the teacher; the maxima are subtracted before the logarithms.
    log_ratio = (largest - other_largest) + tl.log(total / other_total)
    loss = tl.zeros((), dtype=tl.float32)
    mean = tl.zeros((), dtype=tl.float32)
    if DIRECTION == STUDENT_TEACHER:
        mean = tl.sum(difference * decay, axis=0) / total
        loss = mean - log_ratio
    if DIRECTION == TEACHER_STUDENT:
        mean = tl.sum(difference * other_decay, axis=0) / other_total
        loss = mean + log_ratio
    return largest + tl.log(total), other_largest + tl.log(other_total), loss, mean


@triton.jit
def mixture_statistics(
    row_ptr,
    other_ptr,
    V,
    width,
    other_width,
    logit_scale,
    log_partition,
    other_log_partition,
    beta,
    log_beta,
    log_rest,
    BLOCK: tl.constexpr,
):
    """The divergence from the mixture: the student's part of it, and all of it."""
    columns = tl.arange(0, BLOCK)
    of_student = tl.zeros((BLOCK,), dtype=tl.float32)
    of_teacher = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, V, BLOCK):
        s, t = pair_at(row_ptr, other_ptr, start + columns, V, width, other_width, logit_scale)
        log_p = s - log_partition
        log_q = t - other_log_partition
        p = tl.exp(log_p)
        q = tl.exp(log_q)
        log_mixture = log_of_mixture(log_p, log_q, log_beta, log_rest)
        of_student += tl.where(p > 0, p * (log_p - log_mixture), 0.0)
        of_teacher += tl.where(q > 0, q * (log_q - log_mixture), 0.0)
    part = (1.0 - beta) * tl.sum(of_student, axis=0)
    return part, part + beta * tl.sum(of_teacher, axis=0)


@triton.jit
def divergence_gradient(
    s,
    t,
    log_partition,
    other_log_partition,
    along,
    beta,
    log_beta,
    log_rest,
    DIRECTION: tl.constexpr,
):
    """Gradient of the divergence by the student's scores; `along` is the slope's mean under p."""
    log_p = s - log_partition
    log_q = t - other_log_partition
    p = tl.exp(log_p)
    gradient = p - tl.exp(log_q)
    if DIRECTION == STUDENT_TEACHER:
        # The log-partitions cancel, and with them their rounding.
        gradient = tl.where(p > 0, p * (s - t - along), 0.0)
    if DIRECTION == JSD:
        slope = (1.0 - beta) * (log_p - log_of_mixture(log_p, log_q, log_beta, log_rest))
        gradient = tl.where(p > 0, p * (slope - along), 0.0)
    return gradient


@thin_launch
@triton.jit(do_not_specialize=["rows", "ignore_index"])
def divergence_kernel(
    logits_ptr,
    teacher_ptr,
    labels_ptr,
    losses_ptr,
    weights_ptr,
    rows,
    V,
    width,
    other_width,
    stride,
    other_stride,
    ignore_index,
    logit_scale,
    gain,
    beta,
    log_beta,
    log_rest,
    DIRECTION: tl.constexpr,
    WEIGHTS: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A few programs share all rows: divergence, and its gradient in the place of the logits."""
    columns = tl.arange(0, BLOCK)
    for index in range(tl.program_id(0), rows, tl.num_programs(0)):
        row = tl.zeros((), dtype=tl.int64) + index
        row_ptr = logits_ptr + row * stride
        other_ptr = teacher_ptr + row * other_stride
        if tl.load(labels_ptr + row).to(tl.int64) == ignore_index:
            tl.store(losses_ptr + row, 0.0)
            if GRADIENT:
                for start in range(0, V, BLOCK):
                    offsets = start + columns
                    zeros = tl.zeros((BLOCK,), dtype=tl.float32)
                    tl.store(row_ptr + offsets, zeros, mask=offsets < width)
        else:
            log_partition, other_log_partition, loss, along = pair_statistics(
                row_ptr, other_ptr, V, width, other_width, logit_scale, DIRECTION, BLOCK
            )
            if DIRECTION == JSD:
                along, loss = mixture_statistics(
                    row_ptr,
                    other_ptr,
                    V,
                    width,
                    other_width,
                    logit_scale,
                    log_partition,
                    other_log_partition,
                    beta,
                    log_beta,
                    log_rest,
                    BLOCK,
                )
            tl.store(losses_ptr + row, loss)
            if GRADIENT:
                scale = logit_scale * gain
                if WEIGHTS:
                    scale *= tl.load(weights_ptr + row)
                for start in range(0, V, BLOCK):
                    offsets = start + columns
                    s, t = pair_at(row_ptr, other_ptr, offsets, V, width, other_width, logit_scale)
                    gradient = divergence_gradient(
                        s,
                        t,
                        log_partition,
                        other_log_partition,
                        along,
                        beta,
                        log_beta,
                        log_rest,
                        DIRECTION,
                    )
                    tl.store(row_ptr + offsets, gradient * scale, mask=offsets < width)
