"""Cross-entropy of logits."""

from torch import Tensor

from lme_kernels.op import Backend, Op
from lme_kernels.ops.cross_entropy import reference
from lme_kernels.ops.cross_entropy.options import LossOptions, VocabularyShard

CROSS_ENTROPY = Op(
    name="cross_entropy",
    reference=reference.cross_entropy,
    implementations={Backend.TRITON: "lme_kernels.ops.cross_entropy._triton"},
)


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    reduction: str = "mean",
    shard: VocabularyShard | None = None,
    backend: Backend | str | None = None,
) -> Tensor:
    """Negative log-probability of each label, in nats.

    With `z = logit_scale * logits`, bounded by `softcap * tanh(z / softcap)` where asked, and `V`
    classes, a row with label `y` costs
    `logsumexp(z) - (1 - label_smoothing) * z[y] - label_smoothing * mean(z)
    + z_loss * logsumexp(z) ** 2`.

    Args:
        logits: Shape (..., V).
        labels: Classes, shape (...), integer.
        ignore_index: Label of rows that cost nothing and get no gradient.
        label_smoothing: Weight of the uniform distribution in the target, from 0 to 1.
        z_loss: Factor of the squared log-partition, at least 0.
        softcap: Bound on the scaled logits' magnitude, above 0; `None` for no bound.
        logit_scale: Factor of the logits, before the bound.
        reduction: "none" for a loss a row, "sum", or "mean" over the rows that are not ignored.
        shard: Which part of the classes `logits` holds, where they are divided among processes,
            and how to combine with the others; `None` if it holds all. Every process gets the
            whole loss, and the gradient of its own logits.
        backend: Implementation to run; `None` takes the fastest one proven for `logits`' device.

    Returns:
        Shape (...) for "none", else a scalar; at least float32. The mean over no rows is NaN and
        its gradient 0, as in torch. Where a kernel runs, a label that is neither a class nor
        ignored makes its loss NaN (torch stops the process for it).

    Raises:
        ValueError: If the shapes do not fit or an option is out of range.
        UnsupportedBackendError: If `backend` is named and cannot serve the call.

    Source: `torch.nn.functional.cross_entropy`, which it agrees with; z-loss of Chowdhery et al.
    2022, section 5 (arXiv:2204.02311).
    """
    if labels.shape != logits.shape[:-1]:
        expected, got = tuple(logits.shape[:-1]), tuple(labels.shape)
        raise ValueError(f"`labels` must have shape {expected} to match `logits`, got {got}")
    options = LossOptions(
        ignore_index, label_smoothing, z_loss, softcap, logit_scale, reduction, shard
    ).check()
    return CROSS_ENTROPY.choose(backend, logits, labels)(logits, labels, options)
