"""Linear layer and divergence from a teacher's top classes: the wide passes in Triton.

For each chunk of rows one kernel reads the logits for their log-partition; what happens at the K
known classes is plain torch on (rows, K); one kernel turns the logits into the gradient of the
log-partition, and one writes the known classes' gradients over it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lme_kernels._triton_launch import thin_launch
from lme_kernels.custom_ops import define
from lme_kernels.ops.cross_entropy._triton import launch_gradient, launch_statistics
from lme_kernels.ops.cross_entropy.options import LossOptions
from lme_kernels.ops.fused_linear_cross_entropy._triton import (
    rows_fake,
    scaled,
    width_of,
)
from lme_kernels.ops.fused_linear_cross_entropy._triton import why_not as why_not_linear
from lme_kernels.ops.fused_linear_cross_entropy.linear import (
    Evaluated,
    Task,
    evaluate,
    linear_loss,
)
from lme_kernels.ops.fused_linear_kl_div.options import DivergenceOptions
from lme_kernels.ops.fused_linear_topk_kl_div.reference import topk_divergence
from lme_kernels.tuning import next_power_of_two


def why_not(x: Tensor, weight: Tensor) -> str | None:
    return why_not_linear(x, weight, weight)


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


def _evaluate(
    x, weight, others, options, weights, needs_x, needs_weight, accumulate, gain
) -> Evaluated:
    labels, teacher_idx, teacher_logprob = others
    losses, grad_x, grad_weight = _rows(
        x,
        weight,
        labels,
        weights,
        needs_x,
        needs_weight,
        accumulate,
        gain,
        teacher_idx,
        teacher_logprob,
        *options[:3],
        options.ignore_index,
        options.tail,
    )
    return Evaluated(losses, grad_x if needs_x else None, grad_weight if needs_weight else None)


def _head(labels, teacher_idx, teacher_logprob, options):
    as_loss = LossOptions(options.ignore_index, 0.0, 0.0, None, 1.0 / options.temperature, "none")

    def head(logits, rows, weights, gain, wanted):
        T, V = logits.shape
        width = width_of(logits)
        valid = labels[rows] != options.ignore_index
        log_q = teacher_logprob[rows].to(torch.float32)
        known = log_q > -torch.inf
        chosen = teacher_idx[rows].where(known, 0).to(torch.int64)
        parts = torch.empty((4, T), dtype=torch.float32, device=logits.device)
        launch_statistics(logits, None, None, None, parts, width=width, options=as_loss)
        log_partition = parts[0] + torch.log(parts[1])
        scores = logits.gather(-1, chosen).to(torch.float32) * as_loss.logit_scale
        losses, of_scores, of_partition = topk_divergence(scores, log_partition, log_q, options)
        losses = losses.where(valid, 0.0)
        if not wanted:
            return losses, None
        share = valid.to(torch.float32) if weights is None else weights.where(valid, 0.0)
        of_partition = of_partition.where(valid, 0.0) * share
        of_scores = of_scores.where(valid.unsqueeze(-1), 0.0) * share.unsqueeze(-1)
        launch_gradient(
            logits,
            logits,
            None,
            log_partition,
            of_partition,
            width=width,
            options=as_loss,
            classes=V,
            gain=gain,
        )
        p = torch.exp(scores - log_partition.unsqueeze(-1))
        values = (p * of_partition.unsqueeze(-1) + of_scores) * (as_loss.logit_scale * gain)
        K = chosen.shape[1]
        if K > 0:
            _write_kernel[(T,)](
                logits,
                chosen,
                values,
                known,
                K,
                logits.stride(0),
                BLOCK=next_power_of_two(K),
                num_warps=max(1, min(8, K // 128)),
            )
        return losses, logits

    return head


@thin_launch
@triton.jit
def _write_kernel(gradient_ptr, idx_ptr, values_ptr, known_ptr, K, stride, BLOCK: tl.constexpr):
    """One program a row: put values in their places; those of a row are distinct."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < K
    known = tl.load(known_ptr + row * K + columns, mask=mask, other=0) != 0
    idx = tl.load(idx_ptr + row * K + columns, mask=mask, other=0).to(tl.int64)
    values = tl.load(values_ptr + row * K + columns, mask=mask, other=0.0)
    tl.store(gradient_ptr + row * stride + idx, values, mask=mask & known)


def _rows_fake(x, weight, labels, weights, needs_x, needs_weight, accumulate, gain, *rest):
    return rows_fake(x, weight, labels, weights, needs_x, needs_weight, accumulate, gain)


@define(
    "fused_linear_topk_kl_div_rows(Tensor x, Tensor weight, Tensor labels, Tensor? weights, "
    "bool needs_x, bool needs_weight, ScalarType accumulate, float gain, Tensor teacher_idx, "
    "Tensor teacher_logprob, str direction, float beta, float temperature, int ignore_index, "
    "str tail) -> (Tensor, Tensor, Tensor)",
    _rows_fake,
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
    teacher_idx,
    teacher_logprob,
    direction,
    beta,
    temperature,
    ignore_index,
    tail,
):
    options = DivergenceOptions(direction, beta, temperature, "none", ignore_index, tail)
    head = _head(labels, teacher_idx, teacher_logprob, options)
    losses, grad_x, grad_weight = evaluate(
        head, x, weight, weights, needs_x, needs_weight, accumulate, gain
    )
    return (
        losses,
        x.new_empty(0) if grad_x is None else grad_x,
        x.new_empty(0, dtype=accumulate) if grad_weight is None else grad_weight,
    )
