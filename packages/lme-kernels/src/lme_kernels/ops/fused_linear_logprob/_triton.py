"""Log-probabilities under a linear layer: products of torch, what is between them in Triton.

Each chunk of logits is read once in the forward; in the backward once for the log-partition, and
once more as the gradient takes its place.
"""

import torch
from torch import Tensor

from lme_kernels.custom_ops import define
from lme_kernels.ops.cross_entropy._triton import launch_gradient, launch_statistics
from lme_kernels.ops.cross_entropy.options import LossOptions
from lme_kernels.ops.fused_linear_cross_entropy._triton import scaled, why_not, width_of
from lme_kernels.ops.fused_linear_cross_entropy.linear import (
    Evaluated,
    Task,
    evaluate,
    linear_loss,
)
from lme_kernels.ops.fused_linear_logprob.options import LogprobOptions

__all__ = ["fused_linear_logprob", "why_not"]


def fused_linear_logprob(
    x: Tensor, weight: Tensor, labels: Tensor, options: LogprobOptions, accumulate: torch.dtype
) -> Tensor:
    return linear_loss(x, weight, labels, Task(_evaluate, scaled, options, accumulate))


def _evaluate(
    x, weight, others, options, weights, needs_x, needs_weight, accumulate, gain
) -> Evaluated:
    results, grad_x, grad_weight = _rows(
        x,
        weight,
        others[0].contiguous(),
        weights,
        needs_x,
        needs_weight,
        accumulate,
        gain,
        options.ignore_index,
        options.temperature,
        options.entropy,
    )
    return Evaluated(results, grad_x if needs_x else None, grad_weight if needs_weight else None)


def _head(labels, options):
    as_loss = LossOptions(options.ignore_index, 0.0, 0.0, None, 1.0 / options.temperature, "none")

    def head(logits, rows, weights, gain, wanted):
        T = logits.shape[0]
        chosen, width = labels[rows], width_of(logits)
        log_partition = torch.empty(T, dtype=torch.float32, device=logits.device)
        entropy = None
        if options.entropy:
            parts = torch.empty((4, T), dtype=torch.float32, device=logits.device)
            launch_statistics(
                logits, chosen, None, None, parts, width=width, options=as_loss, moment=True
            )
            maximum, partition, at_label, moment = parts.unbind()
            log_partition = maximum + torch.log(partition)
            valid = chosen != options.ignore_index
            entropy = (log_partition - moment / partition).where(valid, 0.0)
            results = torch.stack([(at_label - log_partition).where(valid, 0.0), entropy], dim=-1)
        else:
            losses = torch.empty_like(log_partition)
            launch_statistics(
                logits, chosen, losses, log_partition, None, width=width, options=as_loss
            )
            results = -losses
        if not wanted or weights is None:
            return results, None
        # The kernel takes the gradients of losses, which are minus the log-probabilities.
        launch_gradient(
            logits,
            logits,
            chosen,
            log_partition,
            -(weights[:, 0] if options.entropy else weights),
            width=width,
            options=as_loss,
            classes=logits.shape[1],
            gain=gain,
            entropy=entropy,
            entropy_weights=weights[:, 1].contiguous() if options.entropy else None,
        )
        return results, logits

    return head


def _rows_fake(
    x, weight, labels, weights, needs_x, needs_weight, accumulate, gain, index, temperature, entropy
):
    shape = (x.shape[0], 2) if entropy else (x.shape[0],)
    return (
        x.new_empty(shape, dtype=torch.float32),
        x.new_empty(x.shape if needs_x else (0,)),
        weight.new_empty(weight.shape if needs_weight else (0,), dtype=accumulate),
    )


@define(
    "fused_linear_logprob_rows(Tensor x, Tensor weight, Tensor labels, Tensor? weights, "
    "bool needs_x, bool needs_weight, ScalarType accumulate, float gain, int ignore_index, "
    "float temperature, bool entropy) -> (Tensor, Tensor, Tensor)",
    _rows_fake,
)
def _rows(
    x, weight, labels, weights, needs_x, needs_weight, accumulate, gain, index, temperature, entropy
):
    options = LogprobOptions(index, temperature, entropy)
    results, grad_x, grad_weight = evaluate(
        _head(labels, options),
        x,
        weight,
        weights,
        needs_x,
        needs_weight,
        accumulate,
        gain,
        options.outputs,
    )
    return (
        results,
        x.new_empty(0) if grad_x is None else grad_x,
        x.new_empty(0, dtype=accumulate) if grad_weight is None else grad_weight,
    )
