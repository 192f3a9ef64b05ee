"""Linear layer and divergence from a teacher: products of torch, the divergence in Triton.

For each chunk of rows, the logits of student and teacher; one kernel reads both for their
partition functions and the divergence ("jsd" reads them once more), and both again as the gradient
takes the place of the student's. Extra memory is that of `fused_linear_cross_entropy` and one more
chunk of logits.
"""

import math

import torch
from torch import Tensor

from lme_kernels.custom_ops import define
from lme_kernels.device import why_not_triton
from lme_kernels.ops.fused_linear_cross_entropy._triton import (
    rows_fake,
    scaled,
    shared_programs,
    width_of,
)
from lme_kernels.ops.fused_linear_cross_entropy.linear import (
    Evaluated,
    Task,
    aligned,
    chunk_logits,
    evaluate,
    linear_loss,
)
from lme_kernels.ops.fused_linear_kl_div._triton_kernels import divergence_kernel
from lme_kernels.ops.fused_linear_kl_div.options import DIRECTIONS, DivergenceOptions
from lme_kernels.ops.fused_linear_kl_div.reference import teacher_logits
from lme_kernels.tuning import next_power_of_two

BLOCK = 4096
ELEMENTS_PER_WARP = 256


def why_not(x: Tensor, weight: Tensor, *teacher: Tensor) -> str | None:
    if weight.shape[0] == 0:
        return "there are no classes"
    return why_not_triton(x, weight, *teacher)


def fused_linear_kl_div(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    teacher: tuple[Tensor, ...],
    options: DivergenceOptions,
    accumulate: torch.dtype,
) -> Tensor:
    return linear_loss(x, weight, labels, Task(_evaluate, scaled, options, accumulate), *teacher)


def _evaluate(
    x, weight, others, options, weights, needs_x, needs_weight, accumulate, gain
) -> Evaluated:
    labels, *teacher = others
    labels = labels.contiguous()
    if options.provider is not None:
        head = _head(labels, (), options)
        # Triton launches on the current device, whatever device its arguments are on.
        with torch.cuda.device_of(x):
            return evaluate(head, x, weight, weights, needs_x, needs_weight, accumulate, gain)
    losses, grad_x, grad_weight = _rows(
        x,
        weight,
        labels,
        weights,
        needs_x,
        needs_weight,
        accumulate,
        gain,
        teacher[0],
        teacher[1] if len(teacher) > 1 else None,
        *options[:3],
        options.ignore_index,
    )
    return Evaluated(losses, grad_x if needs_x else None, grad_weight if needs_weight else None)


def _head(labels, teacher, options):
    make_logits = None
    if len(teacher) == 2:
        x, weight = teacher
        make_logits = chunk_logits(x, aligned(x, weight), weight.shape[0])

    def head(logits, rows, weights, gain, wanted):
        T, V = logits.shape
        if make_logits is None:
            other = teacher_logits(teacher, options, rows, logits.shape)
        else:
            other = make_logits(rows)
        if other.stride(1) != 1:
            other = other.contiguous()
        # A teacher's logits may be part of a larger tensor: only rows of our own are padded.
        other_width = V if make_logits is None else width_of(other)
        losses = torch.empty(T, dtype=torch.float32, device=logits.device)
        block = max(16, min(BLOCK, next_power_of_two(V)))
        warps = max(1, block // ELEMENTS_PER_WARP)
        row_bytes = logits.element_size() + other.element_size()
        programs = min(T, shared_programs(V, row_bytes, warps, logits.device))
        divergence_kernel[(programs,)](
            logits,
            other,
            labels[rows],
            losses,
            weights,
            T,
            V,
            width_of(logits),
            other_width,
            logits.stride(0),
            other.stride(0),
            options.ignore_index,
            1.0 / options.temperature,
            gain,
            options.beta,
            math.log(options.beta),
            math.log1p(-options.beta),
            DIRECTION=DIRECTIONS.index(options.direction),
            WEIGHTS=weights is not None,
            GRADIENT=wanted,
            BLOCK=block,
            num_warps=warps,
        )
        return losses, logits if wanted else None

    return head


@define(
    "fused_linear_kl_div_rows(Tensor x, Tensor weight, Tensor labels, Tensor? weights, "
    "bool needs_x, bool needs_weight, ScalarType accumulate, float gain, Tensor teacher, "
    "Tensor? teacher_weight, str direction, float beta, float temperature, int ignore_index) "
    "-> (Tensor, Tensor, Tensor)",
    rows_fake,
)
def _rows(
    x,
    weight,
    labels,
    weights,
    needs_x,
    needs_weight,
    accumulate,
    gain,
    teacher,
    teacher_weight,
    direction,
    beta,
    temperature,
    ignore_index,
):
    options = DivergenceOptions(direction, beta, temperature, "none", ignore_index)
    tensors = (teacher,) if teacher_weight is None else (teacher, teacher_weight)
    losses, grad_x, grad_weight = evaluate(
        _head(labels, tensors, options),
        x,
        weight,
        weights,
        needs_x,
        needs_weight,
        accumulate,
        gain,
    )
    return (
        losses,
        x.new_empty(0) if grad_x is None else grad_x,
        x.new_empty(0, dtype=accumulate) if grad_weight is None else grad_weight,
    )
