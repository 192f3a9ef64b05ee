"""Cross-entropy in Triton: the forward reads the logits once, the backward once more.

Bytes an element of bf16 logits: 2 forward, 2 + 2 backward, 6 in all. Making the gradient in the
forward would take 4 there, the second look at a row being served by the cache, and 4 more to
multiply by the gradient of the loss in the backward, for which the logits' gradient would be held
from one to the other. 8192 rows of 128256 at 3.0 TB/s: 0.7 + 1.4 ms.
"""

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from lme_kernels._triton_rows import as_rows
from lme_kernels.custom_ops import define
from lme_kernels.device import why_not_triton
from lme_kernels.ops.cross_entropy._triton_kernels import gradient_kernel, statistics_kernel
from lme_kernels.ops.cross_entropy.options import LossOptions
from lme_kernels.ops.cross_entropy.reference import combined, reduced, row_losses
from lme_kernels.tuning import next_power_of_two

# Elements of a row that a program holds at a time: 32 bytes of bf16 a thread.
BLOCK = 4096
ELEMENTS_PER_WARP = 512
# An index that no label has, for launches that leave no row out.
NO_LABEL = -(1 << 62)


def why_not(logits: Tensor, labels: Tensor) -> str | None:
    if logits.shape[-1] == 0:
        return "there are no classes"
    return why_not_triton(logits)


def cross_entropy(logits: Tensor, labels: Tensor, options: LossOptions) -> Tensor:
    # The kernels take the numbers alone; the reduction is that of the reference.
    losses = _RowLosses.apply(logits, labels, options)
    return reduced(losses, labels != options.ignore_index, options.reduction)


class _RowLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, labels, options):
        if options.shard is None:
            losses, log_partition = _forward(logits, labels, *_numbers(options))
        else:
            losses, log_partition = _sharded(logits, labels, options)
        ctx.save_for_backward(logits, labels, log_partition)
        ctx.options = options
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_losses):
        logits, labels, log_partition = ctx.saved_tensors
        options = ctx.options
        start = 0 if options.shard is None else options.shard.start
        classes = options.classes(logits.shape[-1])
        numbers = _numbers(options)
        grad = _backward(grad_losses, logits, labels, log_partition, start, classes, *numbers)
        return grad, None, None


def _numbers(options):
    return options[:5]


def _sharded(logits, labels, options):
    shard = options.shard
    parts = statistics(logits, labels, shard.start, *_numbers(options))
    maximum, partition, at_label, total = parts.unbind()
    sums = [at_label, total] if options.label_smoothing else [at_label]
    log_partition, sums = combined(
        maximum.flatten(), partition.flatten(), [each.flatten() for each in sums], shard
    )
    mean = sums[1] / shard.size if options.label_smoothing else None
    losses = row_losses(log_partition, sums[0], mean, options)
    valid = labels.flatten() != options.ignore_index
    return losses.where(valid, 0.0).view(labels.shape), log_partition.view(labels.shape)


def block_of(V: int) -> int:
    """Elements of a row that a program holds at a time."""
    return max(16, min(BLOCK, next_power_of_two(V)))


def warps_of(block: int) -> int:
    """Warps of a program that holds `block` elements."""
    return max(1, block // ELEMENTS_PER_WARP)


def launch_statistics(
    logits: Tensor,
    labels: Tensor | None,
    losses: Tensor | None,
    log_partition: Tensor | None,
    parts: Tensor | None,
    *,
    width: int,
    options: LossOptions,
    start: int = 0,
    moment: bool = False,
) -> None:
    """Write the losses and log-partitions of rows, or the parts of them.

    Args:
        logits: Shape (T, V), rows of unit stride.
        labels: Shape (T,), contiguous; `None` for statistics without a label.
        losses: Shape (T,), float32, with `log_partition`; else `None`.
        log_partition: Shape (T,), float32.
        parts: Shape (4, T), float32: maximum, sum of exponentials relative to it, score of the
            label (0 if it is not in `logits`), and the sum of scores (with smoothing) or of
            exponentials times scores (with `moment`).
        width: Columns that may be read, from `V` to the row stride.
        options: What the loss is.
        start: Class of the first column.
        moment: Whether the further sum is the moment.
    """
    T, V = logits.shape
    block = block_of(V)
    smoothing = options.label_smoothing
    statistics_kernel[(T,)](
        logits,
        labels,
        losses,
        log_partition,
        parts,
        T,
        V,
        width,
        logits.stride(0),
        NO_LABEL if labels is None else options.ignore_index,
        start,
        1.0 - smoothing,
        smoothing / options.classes(V),
        options.z_loss,
        1.0 if options.softcap is None else options.softcap,
        options.logit_scale,
        LABELS=labels is not None,
        LOSS=losses is not None,
        SOFTCAP=options.softcap is not None,
        TOTAL=bool(smoothing) and not moment,
        MOMENT=moment,
        BLOCK=block,
        num_warps=warps_of(block),
    )


def launch_gradient(
    logits: Tensor,
    gradient: Tensor,
    labels: Tensor | None,
    log_partition: Tensor,
    weights: Tensor | None,
    *,
    width: int,
    options: LossOptions,
    classes: int,
    start: int = 0,
    gain: float = 1.0,
    entropy: Tensor | None = None,
    entropy_weights: Tensor | None = None,
) -> None:
    """Write the gradient of the losses by the logits.

    Args:
        logits: Shape (T, V), rows of unit stride.
        gradient: Shape (T, V), rows of unit stride; may be `logits`.
        labels: Shape (T,), contiguous; `None` for the gradient of the log-partition.
        log_partition: Shape (T,), float32.
        weights: Gradient of each loss, shape (T,), float32; `None` for ones.
        width: Columns that may be read and written.
        options: What the loss is.
        classes: Classes of the whole vocabulary.
        start: Class of the first column.
        gain: Factor of the gradient.
        entropy: Entropy of each row, shape (T,), float32, where it has a gradient.
        entropy_weights: That gradient, shape (T,), float32, contiguous.
    """
    T, V = logits.shape
    block = block_of(V)
    blocks = triton.cdiv(width, block)
    smoothing = options.label_smoothing
    gradient_kernel[(T * blocks,)](
        logits,
        gradient,
        labels,
        log_partition,
        weights,
        entropy,
        entropy_weights,
        V,
        width,
        blocks,
        logits.stride(0),
        gradient.stride(0),
        0 if weights is None else weights.stride(0),
        NO_LABEL if labels is None else options.ignore_index,
        start,
        1.0 - smoothing,
        smoothing / classes,
        options.z_loss,
        1.0 if options.softcap is None else options.softcap,
        options.logit_scale,
        gain,
        LABELS=labels is not None,
        WEIGHTS=weights is not None,
        ENTROPY=entropy is not None,
        SOFTCAP=options.softcap is not None,
        BLOCK=block,
        num_warps=warps_of(block),
    )


def _rows(logits):
    logits, stride = as_rows(logits)
    T, V = logits.numel() // logits.shape[-1], logits.shape[-1]
    return logits.as_strided((T, V), (stride, 1))


def _options(ignore_index, label_smoothing, z_loss, softcap, logit_scale):
    return LossOptions(ignore_index, label_smoothing, z_loss, softcap, logit_scale, "none")


def _forward_fake(logits, labels, *numbers):
    losses = logits.new_empty(labels.shape, dtype=torch.float32)
    return losses, torch.empty_like(losses)


_NUMBERS = (
    "int ignore_index, float label_smoothing, float z_loss, float? softcap, float logit_scale"
)


@define(
    f"cross_entropy_forward(Tensor logits, Tensor labels, {_NUMBERS}) -> (Tensor, Tensor)",
    _forward_fake,
)
def _forward(logits, labels, *numbers):
    losses, log_partition = _forward_fake(logits, labels)
    if labels.numel() > 0:
        rows = _rows(logits)
        launch_statistics(
            rows,
            labels.contiguous(),
            losses,
            log_partition,
            None,
            width=rows.shape[1],
            options=_options(*numbers),
        )
    return losses, log_partition


def _statistics_fake(logits, labels, start, *numbers):
    return logits.new_empty((4, *labels.shape), dtype=torch.float32)


@define(
    f"cross_entropy_statistics(Tensor logits, Tensor labels, int start, {_NUMBERS}) -> Tensor",
    _statistics_fake,
)
def statistics(logits, labels, start, *numbers):
    parts = _statistics_fake(logits, labels, start)
    if labels.numel() > 0:
        rows = _rows(logits)
        launch_statistics(
            rows,
            labels.contiguous(),
            None,
            None,
            parts,
            width=rows.shape[1],
            options=_options(*numbers),
            start=start,
        )
    return parts


def _backward_fake(grad_losses, logits, labels, log_partition, start, classes, *numbers):
    return logits.new_empty(logits.shape)


@define(
    "cross_entropy_backward(Tensor grad_losses, Tensor logits, Tensor labels, Tensor log_partition, "
    f"int start, int classes, {_NUMBERS}) -> Tensor",
    _backward_fake,
)
def _backward(grad_losses, logits, labels, log_partition, start, classes, *numbers):
    gradient = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    if labels.numel() > 0:
        rows = _rows(logits)
        weights = grad_losses if grad_losses.ndim == 1 else grad_losses.reshape(-1)
        launch_gradient(
            rows,
            gradient.view(rows.shape),
            labels.contiguous(),
            log_partition,
            weights,
            width=rows.shape[1],
            options=_options(*numbers),
            classes=classes,
            start=start,
        )
    return gradient
