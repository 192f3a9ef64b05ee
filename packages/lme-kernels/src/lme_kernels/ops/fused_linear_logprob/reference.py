"""Log-probabilities of labels under a linear layer in plain torch, a chunk of rows at a time."""

import torch
from torch import Tensor

from lme_kernels.ops.fused_linear_cross_entropy.linear import (
    Evaluated,
    Task,
    evaluate,
    linear_loss,
    scaled,
)
from lme_kernels.ops.fused_linear_logprob.options import LogprobOptions
from lme_kernels.precision import compute_dtype


def fused_linear_logprob(
    x: Tensor, weight: Tensor, labels: Tensor, options: LogprobOptions, accumulate: torch.dtype
) -> Tensor:
    return linear_loss(x, weight, labels, Task(_evaluate, scaled, options, accumulate))


def _evaluate(
    x: Tensor,
    weight: Tensor,
    others: tuple[Tensor, ...],
    options: LogprobOptions,
    weights: Tensor | None,
    needs_x: bool,
    needs_weight: bool,
    accumulate: torch.dtype,
    gain: float,
) -> Evaluated:
    (labels,) = others

    def head(
        logits: Tensor, rows: slice, row_weights: Tensor | None, factor: float, wanted: bool
    ) -> tuple[Tensor, Tensor | None]:
        valid = labels[rows] != options.ignore_index
        chosen = labels[rows].where(valid, 0).to(torch.int64).unsqueeze(-1)
        scores = logits.to(compute_dtype(logits.dtype)) / options.temperature
        log_p = torch.log_softmax(scores, dim=-1)
        results = log_p.gather(-1, chosen).squeeze(-1).where(valid, 0.0)
        p = log_p.exp()
        entropy = torch.zeros_like(results)
        if options.entropy:
            entropy = torch.special.entr(p).sum(dim=-1).where(valid, 0.0)
            results = torch.stack([results, entropy], dim=-1)
        if not wanted or row_weights is None:
            return results, None
        of_label = row_weights[:, 0] if options.entropy else row_weights
        of_label = of_label.where(valid, 0.0).unsqueeze(-1)
        grad = p * -of_label
        grad.scatter_add_(-1, chosen, of_label)
        if options.entropy:
            # The entropy's gradient is -p (log p + entropy).
            surprise = torch.special.xlogy(p, p) + p * entropy.unsqueeze(-1)
            grad -= row_weights[:, 1].where(valid, 0.0).unsqueeze(-1) * surprise
        return results, (grad * (factor / options.temperature)).to(logits.dtype)

    outputs = options.outputs
    return evaluate(head, x, weight, weights, needs_x, needs_weight, accumulate, gain, outputs)
