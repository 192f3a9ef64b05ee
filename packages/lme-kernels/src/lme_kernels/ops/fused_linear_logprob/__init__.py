"""Log-probabilities of labels under a linear layer, whose output never exists whole."""

import torch
from torch import Tensor

from lme_kernels.op import Backend, Op
from lme_kernels.ops.fused_linear_cross_entropy.arguments import check_linear, sum_dtype
from lme_kernels.ops.fused_linear_logprob import reference
from lme_kernels.ops.fused_linear_logprob.options import LogprobOptions, check_temperature

FUSED_LINEAR_LOGPROB = Op(
    name="fused_linear_logprob",
    reference=reference.fused_linear_logprob,
    implementations={Backend.TRITON: "lme_kernels.ops.fused_linear_logprob._triton"},
)


def fused_linear_logprob(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    return_entropy: bool = False,
    ignore_index: int = -100,
    grad_accum_dtype: torch.dtype | None = torch.float32,
    backend: Backend | str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probability of each label under `softmax(x @ weight.T / temperature)`, in nats.

    The logits are made a few rows at a time, in the dtype of `x`, and made again in the backward.

    Args:
        x: Last hidden states, shape (T, H).
        weight: Rows of the output layer, shape (V, H), dtype of `x`.
        labels: Classes, shape (T,), integer.
        temperature: Divisor of the logits, above 0.
        return_entropy: Whether to return the entropy of each row's distribution too.
        ignore_index: Label of rows whose results are 0 and which get no gradient.
        grad_accum_dtype: Dtype in which the gradient of `weight` is summed over rows; `None` for
            that of `weight`.
        backend: Implementation to run; `None` takes the fastest one proven for `x`'s device.

    Returns:
        Log-probabilities, shape (T,), at least float32; with `return_entropy` a pair of them and
        the entropies in nats, of the same shape. Both can be differentiated.

    Raises:
        ValueError: If the shapes or dtypes do not fit or an option is out of range.
        UnsupportedBackendError: If `backend` is named and cannot serve the call.

    Source: what `torch.log_softmax` gives at the label; what policy gradients and preference
    losses are built on.
    """
    check_linear(x, weight, labels)
    check_temperature(temperature)
    options = LogprobOptions(ignore_index, temperature, return_entropy)
    function = FUSED_LINEAR_LOGPROB.choose(backend, x, weight, labels)
    results = function(x, weight, labels, options, sum_dtype(weight, grad_accum_dtype))
    return (results[:, 0], results[:, 1]) if return_entropy else results
