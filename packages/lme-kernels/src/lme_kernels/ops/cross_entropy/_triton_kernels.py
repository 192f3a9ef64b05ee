"""Kernels of the losses over a vocabulary: statistics of rows, and gradients from them."""

import triton
import triton.language as tl

from lme_kernels._triton_launch import thin_launch

# Where a running maximum starts: finite, so that no difference with it is NaN.
LOWEST = tl.constexpr(-3.0e38)


@triton.jit
def bounded(x, logit_scale, softcap, SOFTCAP: tl.constexpr):
    """Scores of logits: scaled and, where asked, bounded."""
    scores = x.to(tl.float32) * logit_scale
    if SOFTCAP:
        # tanh(z) = 2 sigmoid(2 z) - 1
        scores = softcap * (2.0 * tl.sigmoid(2.0 * scores / softcap) - 1.0)
    return scores


@triton.jit
def scores_at(row_ptr, offsets, V, width, logit_scale, softcap, SOFTCAP: tl.constexpr):
    """Scores of a block of a row, minus infinity past its end.

    `width` columns may be read: where rows are padded to a multiple of 16, loads are wide although
    `V` is odd.
    """
    x = tl.load(row_ptr + offsets, mask=offsets < width, other=0.0)
    return tl.where(offsets < V, bounded(x, logit_scale, softcap, SOFTCAP), -float("inf"))


@triton.jit
def extended(maximum, partition, scores):
    """Take one more score into each lane's maximum and sum of exponentials, at one `exp` each.

    Returns the new maximum and sum, the factor of what was summed before, and the new term.
    """
    difference = scores - maximum
    decay = tl.exp(-tl.abs(difference))
    above = difference > 0
    factor = tl.where(above, decay, 1.0)
    term = tl.where(above, 1.0, decay)
    return tl.maximum(maximum, scores), partition * factor + term, factor, term


@triton.jit
def row_statistics(
    row_ptr,
    V,
    width,
    logit_scale,
    softcap,
    SOFTCAP: tl.constexpr,
    TOTAL: tl.constexpr,
    MOMENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Maximum of a row's scores, sum of `exp(score - maximum)`, and one more sum.

    That is the sum of scores (`TOTAL`) or of `exp(score - maximum) * score` (`MOMENT`), else 0.
    Lanes are combined once, after the row: no barrier stands between its loads.
    """
    columns = tl.arange(0, BLOCK)
    maximum = tl.full((BLOCK,), LOWEST, dtype=tl.float32)
    partition = tl.zeros((BLOCK,), dtype=tl.float32)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, V, BLOCK):
        scores = scores_at(row_ptr, start + columns, V, width, logit_scale, softcap, SOFTCAP)
        maximum, partition, factor, term = extended(maximum, partition, scores)
        if TOTAL:
            total += tl.where(start + columns < V, scores, 0.0)
        if MOMENT:
            # A class of score minus infinity has no share in the moment.
            total = total * factor + tl.where(term > 0, term * scores, 0.0)
    largest = tl.max(maximum, axis=0)
    decay = tl.exp(maximum - largest)
    if MOMENT:
        total *= decay
    return largest, tl.sum(partition * decay, axis=0), tl.sum(total, axis=0)


@triton.jit
def score_of_label(
    row_ptr, label, V, vocab_start, logit_scale, softcap, SOFTCAP: tl.constexpr, absent
):
    """Score of a label, or `absent` if the row does not hold it."""
    local = label.to(tl.int64) - vocab_start
    owned = (local >= 0) & (local < V)
    x = tl.load(row_ptr + local, mask=owned, other=0.0)
    return tl.where(owned, bounded(x, logit_scale, softcap, SOFTCAP), absent)


@triton.jit
def gradient_of(
    scores,
    offsets,
    label,
    partition,
    V,
    vocab_start,
    label_share,
    smooth_share,
    z_loss,
    softcap,
    SOFTCAP: tl.constexpr,
):
    """Gradient of one row's cross-entropy by the scaled logits of a block."""
    gradient = tl.exp(scores - partition) * (1.0 + 2.0 * z_loss * partition) - smooth_share
    gradient = tl.where(
        offsets + vocab_start == label.to(tl.int64), gradient - label_share, gradient
    )
    if SOFTCAP:
        slope = scores / softcap
        gradient *= 1.0 - slope * slope
    return gradient


@thin_launch
@triton.jit(do_not_specialize=["ignore_index", "vocab_start", "rows"])
def statistics_kernel(
    logits_ptr,
    labels_ptr,
    losses_ptr,
    partition_ptr,
    parts_ptr,
    rows,
    V,
    width,
    stride,
    ignore_index,
    vocab_start,
    label_share,
    smooth_share,
    z_loss,
    softcap,
    logit_scale,
    LABELS: tl.constexpr,
    LOSS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    TOTAL: tl.constexpr,
    MOMENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a row: the loss and log-partition (`LOSS`), else the parts of them.

    Parts, each over rows: maximum, sum of exponentials, score of the label, the further sum.
    """
    row = tl.program_id(0).to(tl.int64)
    label = row
    if LABELS:
        label = tl.load(labels_ptr + row).to(tl.int64)
    if label == ignore_index:
        if LOSS:
            tl.store(losses_ptr + row, 0.0)
            tl.store(partition_ptr + row, 0.0)
        else:
            for part in tl.static_range(4):
                tl.store(parts_ptr + part * rows + row, 0.0)
    else:
        row_ptr = logits_ptr + row * stride
        maximum, partition, total = row_statistics(
            row_ptr, V, width, logit_scale, softcap, SOFTCAP, TOTAL, MOMENT, BLOCK
        )
        if LOSS:
            log_partition = maximum + tl.log(partition)
            at_label = score_of_label(
                row_ptr, label, V, vocab_start, logit_scale, softcap, SOFTCAP, float("nan")
            )
            loss = log_partition - label_share * at_label + z_loss * log_partition * log_partition
            if TOTAL:
                loss -= smooth_share * total
            tl.store(losses_ptr + row, loss)
            tl.store(partition_ptr + row, log_partition)
        else:
            tl.store(parts_ptr + row, maximum)
            tl.store(parts_ptr + rows + row, partition)
            if LABELS:
                at_label = score_of_label(
                    row_ptr, label, V, vocab_start, logit_scale, softcap, SOFTCAP, 0.0
                )
                tl.store(parts_ptr + 2 * rows + row, at_label)
            if TOTAL or MOMENT:
                tl.store(parts_ptr + 3 * rows + row, total)


@thin_launch
@triton.jit(do_not_specialize=["ignore_index", "vocab_start"])
def gradient_kernel(
    logits_ptr,
    gradient_ptr,
    labels_ptr,
    partition_ptr,
    weights_ptr,
    entropy_ptr,
    entropy_weights_ptr,
    V,
    width,
    blocks,
    stride,
    gradient_stride,
    weights_stride,
    ignore_index,
    vocab_start,
    label_share,
    smooth_share,
    z_loss,
    softcap,
    logit_scale,
    gain,
    LABELS: tl.constexpr,
    WEIGHTS: tl.constexpr,
    ENTROPY: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a block of a row: its gradient, from the row's log-partition.

    Without labels the gradient is that of the log-partition alone. Reads all of its logits before
    it writes, so that the gradient may take their place.
    """
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64)
    offsets = (program % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    out_ptr = gradient_ptr + row * gradient_stride + offsets
    mask = offsets < width
    label = row
    if LABELS:
        label = tl.load(labels_ptr + row).to(tl.int64)
    if label == ignore_index:
        tl.store(out_ptr, tl.zeros((BLOCK,), dtype=tl.float32), mask=mask)
    else:
        partition = tl.load(partition_ptr + row)
        scores = scores_at(
            logits_ptr + row * stride, offsets, V, width, logit_scale, softcap, SOFTCAP
        )
        if LABELS:
            gradient = gradient_of(
                scores,
                offsets,
                label,
                partition,
                V,
                vocab_start,
                label_share,
                smooth_share,
                z_loss,
                softcap,
                SOFTCAP,
            )
        else:
            gradient = tl.exp(scores - partition)
        if WEIGHTS:
            gradient *= tl.load(weights_ptr + row * weights_stride)
        if ENTROPY:
            # The entropy's gradient is -p (log p + entropy).
            share = tl.exp(scores - partition)
            surprise = tl.where(share > 0, scores - partition, 0.0)
            entropy = tl.load(entropy_ptr + row)
            gradient -= tl.load(entropy_weights_ptr + row) * share * (surprise + entropy)
        tl.store(out_ptr, gradient * (logit_scale * gain), mask=mask)


@thin_launch
@triton.jit(do_not_specialize=["rows", "ignore_index"])
def loss_and_gradient_kernel(
    logits_ptr,
    labels_ptr,
    losses_ptr,
    weights_ptr,
    rows,
    V,
    width,
    stride,
    ignore_index,
    label_share,
    smooth_share,
    z_loss,
    softcap,
    logit_scale,
    gain,
    WEIGHTS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    TOTAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A few programs share all rows: loss of a row, and its gradient in the place of its logits.

    The second look at a row finds it in the cache of the device, where so few rows are in work at
    a time that they fit into it.
    """
    columns = tl.arange(0, BLOCK)
    for index in range(tl.program_id(0), rows, tl.num_programs(0)):
        row = tl.zeros((), dtype=tl.int64) + index
        row_ptr = logits_ptr + row * stride
        label = tl.load(labels_ptr + row).to(tl.int64)
        if label == ignore_index:
            tl.store(losses_ptr + row, 0.0)
            for start in range(0, V, BLOCK):
                offsets = start + columns
                tl.store(
                    row_ptr + offsets, tl.zeros((BLOCK,), dtype=tl.float32), mask=offsets < width
                )
        else:
            # Read before the row's sums, whose barrier keeps it from being overwritten below.
            at_label = score_of_label(
                row_ptr, label, V, 0, logit_scale, softcap, SOFTCAP, float("nan")
            )
            maximum, partition, total = row_statistics(
                row_ptr, V, width, logit_scale, softcap, SOFTCAP, TOTAL, False, BLOCK
            )
            log_partition = maximum + tl.log(partition)
            loss = log_partition - label_share * at_label + z_loss * log_partition * log_partition
            if TOTAL:
                loss -= smooth_share * total
            tl.store(losses_ptr + row, loss)
            factor = logit_scale * gain
            if WEIGHTS:
                factor *= tl.load(weights_ptr + row)
            for start in range(0, V, BLOCK):
                offsets = start + columns
                scores = scores_at(row_ptr, offsets, V, width, logit_scale, softcap, SOFTCAP)
                gradient = gradient_of(
                    scores,
                    offsets,
                    label,
                    log_partition,
                    V,
                    0,
                    label_share,
                    smooth_share,
                    z_loss,
                    softcap,
                    SOFTCAP,
                )
                tl.store(row_ptr + offsets, gradient * factor, mask=offsets < width)


@thin_launch
@triton.jit
def scale_kernel(x_ptr, y_ptr, factor_ptr, count, BLOCK: tl.constexpr):
    """`y = factor * x`, computed in float32; `y` may be `x`."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < count
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + offsets, x * tl.load(factor_ptr), mask=mask)
