"""Divergence of a linear layer's output from the most likely classes of a teacher."""

import torch
from torch import Tensor

from lme_kernels.op import Backend, Op
from lme_kernels.ops.fused_linear_cross_entropy.arguments import check_linear, sum_dtype
from lme_kernels.ops.fused_linear_kl_div.options import DivergenceOptions
from lme_kernels.ops.fused_linear_topk_kl_div import reference

FUSED_LINEAR_TOPK_KL_DIV = Op(
    name="fused_linear_topk_kl_div",
    reference=reference.fused_linear_topk_kl_div,
    implementations={Backend.TRITON: "lme_kernels.ops.fused_linear_topk_kl_div._triton"},
)


def fused_linear_topk_kl_div(
    x: Tensor,
    weight: Tensor,
    teacher_idx: Tensor,
    teacher_logprob: Tensor,
    labels: Tensor | None = None,
    *,
    direction: str = "student_teacher",
    tail: str = "bin",
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: str = "mean",
    ignore_index: int = -100,
    grad_accum_dtype: torch.dtype | None = torch.float32,
    backend: Backend | str | None = None,
) -> Tensor:
    """Divergence between `softmax(x @ weight.T / temperature)` and a teacher known at K classes.

    The directions are those of `fused_linear_kl_div`, over these classes: with `tail="bin"` the K
    and one that holds the rest of both sides' probability; with "renormalise" the K, each side
    divided by its sum over them; with "ignore" the K as they are, so that the result is no
    divergence and may be negative. To divide the teacher alone, divide before and use "bin". The
    logits are made a few rows at a time; the gradient is dense.

    Args:
        x: The student's last hidden states, shape (T, H).
        weight: Rows of the student's output layer, shape (V, H), dtype of `x`.
        teacher_idx: Classes, shape (T, K), integer, distinct within a row.
        teacher_logprob: The teacher's log-probabilities there, in nats, shape (T, K), at the
            temperature wanted; minus infinity marks an entry that is not there, whatever its class.
        labels: Shape (T,), integer, of which only `ignore_index` matters; `None` counts all rows.
        direction: "student_teacher", "teacher_student" or "jsd".
        tail: "bin", "renormalise" or "ignore".
        beta: Share of the teacher in the mixture of "jsd", between 0 and 1.
        temperature: Divisor of the student's logits, above 0.
        reduction: "none" for a divergence a row, "sum", or "mean" over the rows that are not
            ignored.
        ignore_index: Label of rows that cost nothing and get no gradient.
        grad_accum_dtype: Dtype in which the gradient of `weight` is summed over rows; `None` for
            that of `weight`.
        backend: Implementation to run; `None` takes the fastest one proven for `x`'s device.

    Returns:
        Shape (T,) for "none", else a scalar; at least float32. A row without entries costs 0,
        except for "bin", where all of it is rest. The mean over no rows is NaN.

    Raises:
        ValueError: If the shapes or dtypes do not fit or an option is out of range.
        UnsupportedBackendError: If `backend` is named and cannot serve the call.

    Source: `fused_linear_kl_div` over the classes described here.
    """
    check_linear(x, weight, labels)
    T = x.shape[0]
    if teacher_idx.ndim != 2 or teacher_idx.shape[0] != T:
        raise ValueError(
            f"`teacher_idx` must have shape ({T}, K) to match `x`, got {tuple(teacher_idx.shape)}"
        )
    if teacher_logprob.shape != teacher_idx.shape:
        expected, got = tuple(teacher_idx.shape), tuple(teacher_logprob.shape)
        raise ValueError(
            f"`teacher_logprob` must have shape {expected} to match `teacher_idx`, got {got}"
        )
    options = DivergenceOptions(direction, beta, temperature, reduction, ignore_index, tail).check()
    if labels is None:
        labels = torch.full((T,), ignore_index + 1, dtype=torch.int64, device=x.device)
    function = FUSED_LINEAR_TOPK_KL_DIV.choose(backend, x, weight)
    accumulate = sum_dtype(weight, grad_accum_dtype)
    return function(x, weight, labels, teacher_idx, teacher_logprob.detach(), options, accumulate)
