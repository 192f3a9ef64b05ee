"""Losses of a linear layer's output, which never exists whole: what all of them share.

A loss gives a `Head`: what becomes of the logits of some rows. Reduced to a scalar, its gradients
are made in the forward, while the logits are there (6 operations for each row, channel and class
instead of 8), and multiplied by the gradient of the loss in the backward. By row, the backward
makes the logits again.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lme_kernels.ops.cross_entropy.reference import reduced
from lme_kernels.ops.fused_linear_cross_entropy.chunks import chunks_of
from lme_kernels.precision import compute_dtype

Head = Callable[[Tensor, slice, Tensor | None, float, bool], tuple[Tensor, Tensor | None]]
"""Takes the logits of some rows, shape (n, V), which it may overwrite; the rows; the gradient of
each loss, shape (n,) or that of the losses, or `None` for ones; a factor of the logits' gradient;
and whether that gradient is wanted. Returns the losses, shape (n,) or (n, outputs), 0 in ignored
rows, and their gradient by the logits, in the dtype of the logits."""

# Where gradients are made before that of the loss is known, those of float16 logits are moved to
# where float16 is exact: a probability of 1e-7 would else be rounded to one digit.
HALF_GAIN = 256.0
# A row of logits of so many classes starts at a multiple of 128 bytes.
ALIGNED_CLASSES = 64
# Bytes of one product in float32 that is then added, where the product cannot add.
SLICE_BYTES = 32 << 20


class Evaluated(NamedTuple):
    """Losses and, if they were wanted, sums of gradients."""

    losses: Tensor
    """Shape (T,) or (T, outputs), at least float32."""
    grad_x: Tensor | None
    """Shape (T, H), dtype of `x`."""
    grad_weight: Tensor | None
    """Shape (V, H), in the dtype that it is summed in."""


class Task(NamedTuple):
    """A loss of a linear layer, as `linear_loss` takes it."""

    evaluate: Callable[..., Evaluated]
    """Takes `x`, `weight`, the other tensors as a tuple, `options`, the gradient of each loss or
    `None`, whether `x` and whether `weight` need a gradient, the dtype of sums, and the gain."""
    scaled: Callable[[Tensor, Tensor, torch.dtype], Tensor]
    """Takes a tensor that it may overwrite, a factor and a dtype; returns the product."""
    options: Any
    """Options of the loss, with `reduction` and `ignore_index`."""
    accumulate: torch.dtype
    """Dtype in which the gradient of the weight is summed over chunks."""


def linear_loss(x: Tensor, weight: Tensor, labels: Tensor, task: Task, *tensors: Tensor) -> Tensor:
    """Evaluate and reduce a loss, with gradients to `x` and `weight`.

    Args:
        x: Shape (T, H).
        weight: Shape (V, H).
        labels: Shape (T,); rows whose label is `task.options.ignore_index` are left out.
        task: The loss.
        tensors: What else the loss needs; no gradient flows to it.

    Returns:
        Shape (T,) for "none", else a scalar.
    """
    options = task.options
    enabled = torch.is_grad_enabled()
    needs = (enabled and x.requires_grad, enabled and weight.requires_grad)
    if any(needs):
        function = _ByRow if options.reduction == "none" else _Reduced
        return function.apply(x, weight, labels, task, needs, *tensors)
    others = (labels, *tensors)
    losses = task.evaluate(
        x, weight, others, options, None, False, False, task.accumulate, 1.0
    ).losses
    return reduced(losses, labels != options.ignore_index, options.reduction)


def evaluate(
    head: Head,
    x: Tensor,
    weight: Tensor,
    weights: Tensor | None,
    needs_x: bool,
    needs_weight: bool,
    accumulate: torch.dtype,
    gain: float,
    outputs: tuple[int, ...] = (),
) -> Evaluated:
    """Run a head over all rows, a chunk at a time.

    Args:
        head: What becomes of logits.
        x: Shape (T, H).
        weight: Shape (V, H).
        weights: Gradient of each loss, of the shape of the losses; `None` for ones.
        needs_x: Whether the gradient of `x` is wanted.
        needs_weight: Whether that of `weight` is.
        accumulate: Dtype of the sums of the latter.
        gain: Factor of both gradients.
        outputs: Shape of one row's losses.

    Returns:
        Losses and gradients.
    """
    T = x.shape[0]
    losses = torch.empty((T, *outputs), dtype=compute_dtype(x.dtype), device=x.device)
    grad_x = torch.empty((T, x.shape[1]), dtype=x.dtype, device=x.device) if needs_x else None
    grad_weight: Tensor | None = None
    wanted = needs_x or needs_weight
    V = weight.shape[0]
    wide = aligned(x, weight)
    make_logits = chunk_logits(x, wide, V)
    for rows in chunks_of(x, weight, accumulate):
        logits = make_logits(rows)
        row_weights = None if weights is None else weights[rows]
        losses[rows], grad_logits = head(logits, rows, row_weights, gain, wanted)
        if grad_logits is not None:
            grad_logits = _widened(grad_logits, wide.shape[0])
            if grad_x is not None:
                torch.mm(grad_logits, wide, out=grad_x[rows])
            if needs_weight:
                grad_weight = _add_product(grad_weight, grad_logits, x[rows], accumulate)
        # Two chunks of logits at once would be twice the memory.
        del logits, grad_logits
    if needs_weight and grad_weight is None:
        grad_weight = torch.zeros(weight.shape, dtype=accumulate, device=weight.device)
    return Evaluated(losses, grad_x, None if grad_weight is None else grad_weight[:V])


def aligned(x: Tensor, weight: Tensor) -> Tensor:
    """Return `weight`, on a GPU with rows of zeros up to a multiple of 64 classes.

    Products of matrices whose rows do not start at multiples of 16 bytes, or with such a number of
    classes, run at a third of the speed or less.

    Args:
        x: What it is multiplied with, shape (T, H).
        weight: Shape (V, H).
    """
    missing = -weight.shape[0] % ALIGNED_CLASSES
    if missing == 0 or not _takes_one_buffer(x):
        return weight
    return torch.cat((weight, weight.new_zeros((missing, weight.shape[1]))))


def chunk_logits(x: Tensor, weight: Tensor, classes: int) -> Callable[[slice], Tensor]:
    """Return a function that makes the logits of some rows, on a GPU always in the same memory.

    Args:
        x: Shape (T, H).
        weight: From `aligned`, shape (V or more, H).
        classes: V.

    Returns:
        Takes a slice of rows, the first as long as any, and returns their logits, shape (n, V),
        which are there until the next call.
    """
    if not _takes_one_buffer(x):
        return lambda rows: x[rows] @ weight.t()
    buffers: list[Tensor] = []

    def make(rows: slice) -> Tensor:
        rows_of_x = x[rows]
        if not buffers:
            buffers.append(x.new_empty((rows_of_x.shape[0], weight.shape[0])))
        logits = torch.mm(rows_of_x, weight.t(), out=buffers[0][: rows_of_x.shape[0]])
        return logits[:, :classes]

    return make


def scaled(tensor: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Multiply in at least float32, in place where nothing is rounded on the way."""
    if tensor.dtype == dtype == factor.dtype:
        return tensor.mul_(factor)
    return (tensor.to(factor.dtype) * factor).to(dtype)


class _Reduced(torch.autograd.Function):
    """A scalar loss, whose gradients are there before the backward begins."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        labels: Tensor,
        task: Task,
        needs: tuple[bool, bool],
        *tensors: Tensor,
    ) -> Tensor:
        options = task.options
        gain = HALF_GAIN if x.dtype == torch.float16 else 1.0
        losses, grad_x, grad_weight = task.evaluate(
            x, weight, (labels, *tensors), options, None, *needs, task.accumulate, gain
        )
        valid = labels != options.ignore_index
        # Without targets the loss is 0 / 0, but no row has a gradient.
        share = valid.sum().clamp(min=1).to(losses.dtype).reciprocal()
        if options.reduction == "sum":
            share = torch.ones_like(share)
        ctx.task, ctx.needs, ctx.gain = task, needs, gain
        ctx.traced = torch.compiler.is_compiling()
        if ctx.traced:
            ctx.save_for_backward(share, grad_x, grad_weight)
            ctx.dtypes = (x.dtype, weight.dtype)
        else:
            # The first backward takes the gradients and may overwrite them, so that they exist
            # once; a further one (`retain_graph`) finds none and computes them again.
            ctx.save_for_backward(share, x, weight, labels, *tensors)
            ctx.gradients = [(grad_x, grad_weight)]
        return reduced(losses, valid, options.reduction)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        task = ctx.task
        absent = (None,) * (len(ctx.needs_input_grad) - 2)
        if ctx.traced:
            share, grad_x, grad_weight = ctx.saved_tensors
            factor = grad_loss.to(share.dtype) * share / ctx.gain
            of_x, of_weight = ctx.dtypes
            return (
                None if grad_x is None else (grad_x.to(factor.dtype) * factor).to(of_x),
                None
                if grad_weight is None
                else (grad_weight.to(factor.dtype) * factor).to(of_weight),
                *absent,
            )
        share, x, weight, *others = ctx.saved_tensors
        if ctx.gradients:
            grad_x, grad_weight = ctx.gradients.pop()
        else:
            _, grad_x, grad_weight = task.evaluate(
                x,
                weight,
                tuple(others),
                task.options,
                None,
                *ctx.needs,
                task.accumulate,
                ctx.gain,
            )
        factor = grad_loss.to(share.dtype) * share / ctx.gain
        return (
            None if grad_x is None else task.scaled(grad_x, factor, x.dtype),
            None if grad_weight is None else task.scaled(grad_weight, factor, weight.dtype),
            *absent,
        )


class _ByRow(torch.autograd.Function):
    """Losses by row; the backward makes the logits again."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        labels: Tensor,
        task: Task,
        needs: tuple[bool, bool],
        *tensors: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, labels, *tensors)
        ctx.task, ctx.needs = task, needs
        return task.evaluate(
            x, weight, (labels, *tensors), task.options, None, False, False, task.accumulate, 1.0
        ).losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_losses: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, *others = ctx.saved_tensors
        task = ctx.task
        _, grad_x, grad_weight = task.evaluate(
            x,
            weight,
            tuple(others),
            task.options,
            grad_losses.contiguous(),
            *ctx.needs,
            task.accumulate,
            1.0,
        )
        absent = (None,) * (len(ctx.needs_input_grad) - 2)
        return grad_x, None if grad_weight is None else grad_weight.to(weight.dtype), *absent


def _widened(grad_logits: Tensor, width: int) -> Tensor:
    """Take the columns that pad the logits' rows in, as zeros."""
    rows, V = grad_logits.shape
    if width == V:
        return grad_logits
    if grad_logits.stride() != (width, 1):
        return F.pad(grad_logits, (0, width - V))
    whole = grad_logits.as_strided((rows, width), (width, 1))
    whole[:, V:] = 0.0
    return whole


def _takes_one_buffer(x: Tensor) -> bool:
    return x.is_cuda and not torch.compiler.is_compiling()


def _add_product(
    total: Tensor | None, grad_logits: Tensor, x: Tensor, dtype: torch.dtype
) -> Tensor:
    """Add `grad_logits.T @ x` to `total`, rounding no earlier than to `dtype`."""
    transposed = grad_logits.t()
    if grad_logits.dtype == dtype:
        return transposed @ x if total is None else total.addmm_(transposed, x)
    if not x.is_cuda or x.dtype.itemsize != 2 or dtype != torch.float32:
        product = transposed.to(dtype) @ x.to(dtype)
        return product if total is None else total.add_(product)
    if total is None:
        return torch.mm(transposed, x, out_dtype=dtype)
    if _adds_in_float32(x.device, x.dtype):
        return torch.ops.aten.addmm.dtype_out(total, transposed, x, dtype, out=total)
    step = max(256, SLICE_BYTES // (4 * max(x.shape[1], 1)))
    for start in range(0, total.shape[0], step):
        part = torch.mm(transposed[start : start + step], x, out_dtype=dtype)
        total[start : start + step] += part
    return total


@cache
def _adds_in_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a product of 16-bit matrices can be added to a float32 one: not in every torch."""
    total = torch.ones((16, 16), dtype=torch.float32, device=device)
    one = torch.zeros((16, 16), dtype=dtype, device=device)
    try:
        torch.ops.aten.addmm.dtype_out(total, one, one, torch.float32, out=total)
    except RuntimeError:
        return False
    return True
