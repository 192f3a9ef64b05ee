"""Linear layer and cross-entropy: matrix products of torch, the loss between them in Triton.

For each chunk of rows: logits = x W^T into a buffer; one kernel takes the loss and puts the
gradient in the place of the logits; dx = dlogits W; dW += dlogits^T x, in float32. How many rows,
and what memory that takes, is said in `chunks`. 8192 rows of 2048 channels and 128256 classes are
12.9 TFLOP; the kernel reads and writes each logit once (a second look is served by the cache):
4.2 GB.
"""

import torch
import triton
from torch import Tensor

from lme_kernels._triton_rows import num_processors
from lme_kernels.custom_ops import define
from lme_kernels.device import why_not_triton
from lme_kernels.ops.cross_entropy._triton import launch_gradient, launch_statistics
from lme_kernels.ops.cross_entropy._triton_kernels import loss_and_gradient_kernel, scale_kernel
from lme_kernels.ops.cross_entropy.options import LossOptions
from lme_kernels.ops.cross_entropy.reference import combined, row_losses
from lme_kernels.ops.fused_linear_cross_entropy.linear import (
    Evaluated,
    Task,
    evaluate,
    linear_loss,
)
from lme_kernels.tuning import next_power_of_two

# What a program holds of a row: 32 bytes of bf16 a thread, 32 KiB in flight on a multiprocessor
# that works at one row.
BLOCK = 16384
ELEMENTS_PER_WARP = 512
# Share of the device's cache that rows in work may take.
CACHE_SHARE = 0.8
SCALE_BLOCK = 4096


def why_not(x: Tensor, weight: Tensor, labels: Tensor) -> str | None:
    if weight.shape[0] == 0:
        return "there are no classes"
    return why_not_triton(x, weight)


def fused_linear_cross_entropy(
    x: Tensor, weight: Tensor, labels: Tensor, options: LossOptions, accumulate: torch.dtype
) -> Tensor:
    return linear_loss(x, weight, labels, Task(_evaluate, scaled, options, accumulate))


def width_of(logits: Tensor) -> int:
    """Columns of a chunk of logits that may be read and written: rows may be padded."""
    return logits.stride(0) if logits.shape[0] > 1 else logits.shape[1]


def scaled(tensor: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Multiply `tensor`, which is overwritten if `dtype` is its own, in float32."""
    result = tensor if tensor.dtype == dtype else torch.empty_like(tensor, dtype=dtype)
    if tensor.numel() > 0:
        grid = (triton.cdiv(tensor.numel(), SCALE_BLOCK),)
        scale_kernel[grid](tensor, result, factor, tensor.numel(), BLOCK=SCALE_BLOCK, num_warps=8)
    return result


def shared_programs(V: int, element_bytes: int, warps: int, device: torch.device) -> int:
    """Programs that share the rows of a chunk, so that the rows in work fit into the cache."""
    processors = num_processors(device)
    # By registers, of which a thread takes up to 64.
    resident = max(1, 32 // warps)
    if device.type == "cuda":
        cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        fitting = int(CACHE_SHARE * cache_bytes) // (processors * V * element_bytes)
        resident = max(1, min(resident, fitting))
    return processors * resident


def _evaluate(
    x, weight, others, options, weights, needs_x, needs_weight, accumulate, gain
) -> Evaluated:
    (labels,) = others
    labels = labels.contiguous()
    if options.shard is not None:
        head = _sharded_head(labels, options)
        # Triton launches on the current device, whatever device its arguments are on.
        with torch.cuda.device_of(x):
            return evaluate(head, x, weight, weights, needs_x, needs_weight, accumulate, gain)
    losses, grad_x, grad_weight = _rows(
        x, weight, labels, weights, needs_x, needs_weight, accumulate, gain, *options[:5]
    )
    return Evaluated(losses, grad_x if needs_x else None, grad_weight if needs_weight else None)


def _head(labels, options):
    def head(logits, rows, weights, gain, wanted):
        T, V = logits.shape
        chosen = labels[rows]
        losses = torch.empty(T, dtype=torch.float32, device=logits.device)
        if not wanted:
            launch_statistics(
                logits,
                chosen,
                losses,
                torch.empty_like(losses),
                None,
                width=width_of(logits),
                options=options,
            )
            return losses, None
        smoothing = options.label_smoothing
        # Bounds and a further sum take registers: half as many elements a thread.
        share = 2 if smoothing or options.softcap is not None else 1
        block = max(16, min(BLOCK // share, next_power_of_two(V)))
        # A program has at most 1024 threads; AMD's warps are of 64.
        most = 32 if torch.version.hip is None else 16
        warps = max(1, min(most, block * share // ELEMENTS_PER_WARP))
        programs = min(T, shared_programs(V, logits.element_size(), warps, logits.device))
        loss_and_gradient_kernel[(programs,)](
            logits,
            chosen,
            losses,
            weights,
            T,
            V,
            width_of(logits),
            logits.stride(0),
            options.ignore_index,
            1.0 - smoothing,
            smoothing / V,
            options.z_loss,
            1.0 if options.softcap is None else options.softcap,
            options.logit_scale,
            gain,
            WEIGHTS=weights is not None,
            SOFTCAP=options.softcap is not None,
            TOTAL=bool(smoothing),
            BLOCK=block,
            num_warps=warps,
        )
        return losses, logits

    return head


def _sharded_head(labels, options):
    shard = options.shard

    def head(logits, rows, weights, gain, wanted):
        T = logits.shape[0]
        chosen, width = labels[rows], width_of(logits)
        parts = torch.empty((4, T), dtype=torch.float32, device=logits.device)
        launch_statistics(
            logits, chosen, None, None, parts, width=width, options=options, start=shard.start
        )
        maximum, partition, at_label, total = parts.unbind()
        sums = [at_label, total] if options.label_smoothing else [at_label]
        log_partition, sums = combined(maximum, partition, sums, shard)
        mean = sums[1] / shard.size if options.label_smoothing else None
        losses = row_losses(log_partition, sums[0], mean, options)
        losses = losses.where(chosen != options.ignore_index, 0.0)
        if not wanted:
            return losses, None
        launch_gradient(
            logits,
            logits,
            chosen,
            log_partition,
            weights,
            width=width,
            options=options,
            classes=shard.size,
            start=shard.start,
            gain=gain,
        )
        return losses, logits

    return head


def rows_fake(x, weight, labels, weights, needs_x, needs_weight, accumulate, gain, *numbers):
    """Empty results of an op over rows: losses and gradients."""
    losses = x.new_empty(x.shape[0], dtype=torch.float32)
    grad_x = x.new_empty(x.shape if needs_x else (0,))
    return (
        losses,
        grad_x,
        weight.new_empty(weight.shape if needs_weight else (0,), dtype=accumulate),
    )


@define(
    "fused_linear_cross_entropy_rows(Tensor x, Tensor weight, Tensor labels, Tensor? weights, "
    "bool needs_x, bool needs_weight, ScalarType accumulate, float gain, int ignore_index, "
    "float label_smoothing, float z_loss, float? softcap, float logit_scale) "
    "-> (Tensor, Tensor, Tensor)",
    rows_fake,
)
def _rows(x, weight, labels, weights, needs_x, needs_weight, accumulate, gain, *numbers):
    head = _head(labels, LossOptions(*numbers, "none"))
    losses, grad_x, grad_weight = evaluate(
        head, x, weight, weights, needs_x, needs_weight, accumulate, gain
    )
    absent = x.new_empty(0)
    return (
        losses,
        absent if grad_x is None else grad_x,
        x.new_empty(0, dtype=accumulate) if grad_weight is None else grad_weight,
    )
