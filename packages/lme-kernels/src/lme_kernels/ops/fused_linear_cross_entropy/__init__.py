"""Cross-entropy of a linear layer's output, which never exists whole."""

import torch
from torch import Tensor

from lme_kernels.op import Backend, Op
from lme_kernels.ops.cross_entropy.options import LossOptions, VocabularyShard
from lme_kernels.ops.fused_linear_cross_entropy import reference
from lme_kernels.ops.fused_linear_cross_entropy.arguments import check_linear, sum_dtype

FUSED_LINEAR_CROSS_ENTROPY = Op(
    name="fused_linear_cross_entropy",
    reference=reference.fused_linear_cross_entropy,
    implementations={Backend.TRITON: "lme_kernels.ops.fused_linear_cross_entropy._triton"},
)


def fused_linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    reduction: str = "mean",
    shard: VocabularyShard | None = None,
    grad_accum_dtype: torch.dtype | None = torch.float32,
    backend: Backend | str | None = None,
) -> Tensor:
    """Negative log-probability of each label under `x @ weight.T`, in nats.

    What a row costs is said in `cross_entropy`. The logits are made a few rows at a time, in the
    dtype of `x`. A scalar loss makes the gradients at once and keeps them; the first backward
    hands them on, multiplied, and a further one (`retain_graph`) makes the logits again, as the
    backward of losses by row does.

    Args:
        x: Last hidden states, shape (T, H).
        weight: Rows of the output layer, shape (V, H), dtype of `x`.
        labels: Classes, shape (T,), integer.
        ignore_index: Label of rows that cost nothing and get no gradient.
        label_smoothing: Weight of the uniform distribution in the target, from 0 to 1.
        z_loss: Factor of the squared log-partition, at least 0.
        softcap: Bound on the scaled logits' magnitude, above 0; `None` for no bound.
        logit_scale: Factor of the logits, before the bound.
        reduction: "none" for a loss a row, "sum", or "mean" over the rows that are not ignored.
        shard: Which part of the classes `weight` holds, where they are divided among processes,
            and how to combine with the others, called for each chunk of rows; `None` if it holds
            all. Every process gets the whole loss and the gradient of its own `weight`; its
            gradient of `x` is a share, to be summed over processes. Not under `torch.compile`.
        grad_accum_dtype: Dtype in which the gradient of `weight` is summed over rows; `None` for
            that of `weight`, which takes less memory and rounds more.
        backend: Implementation to run; `None` takes the fastest one proven for `x`'s device.

    Returns:
        Shape (T,) for "none", else a scalar; at least float32. The mean over no rows is NaN and
        its gradient 0, as in torch. Where a kernel runs, a label that is neither a class nor
        ignored makes its loss NaN.

    Raises:
        ValueError: If the shapes or dtypes do not fit or an option is out of range.
        UnsupportedBackendError: If `backend` is named and cannot serve the call.

    Source: Wijmans et al. 2024 (arXiv:2411.09009) for the idea; the numbers are those of
    `torch.nn.functional.cross_entropy`.
    """
    check_linear(x, weight, labels)
    options = LossOptions(
        ignore_index, label_smoothing, z_loss, softcap, logit_scale, reduction, shard
    ).check()
    accumulate = sum_dtype(weight, grad_accum_dtype)
    function = FUSED_LINEAR_CROSS_ENTROPY.choose(backend, x, weight, labels)
    return function(x, weight, labels, options, accumulate)
