"""Divergence of a linear layer's output from a teacher's; neither exists whole."""

import torch
from torch import Tensor

from lme_kernels.op import Backend, Op
from lme_kernels.ops.fused_linear_cross_entropy.arguments import check_linear, sum_dtype
from lme_kernels.ops.fused_linear_kl_div import reference
from lme_kernels.ops.fused_linear_kl_div.options import DivergenceOptions, TeacherLogits

FUSED_LINEAR_KL_DIV = Op(
    name="fused_linear_kl_div",
    reference=reference.fused_linear_kl_div,
    implementations={Backend.TRITON: "lme_kernels.ops.fused_linear_kl_div._triton"},
)


def fused_linear_kl_div(
    x: Tensor,
    weight: Tensor,
    teacher: Tensor | TeacherLogits,
    teacher_weight: Tensor | None = None,
    labels: Tensor | None = None,
    *,
    direction: str = "student_teacher",
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: str = "mean",
    ignore_index: int = -100,
    grad_accum_dtype: torch.dtype | None = torch.float32,
    backend: Backend | str | None = None,
) -> Tensor:
    """Divergence between `p = softmax(x @ weight.T / temperature)` and a teacher's `q`, in nats.

    "student_teacher" is `KL(p || q) = sum(p log(p / q))`, "teacher_student" is `KL(q || p)`, and
    "jsd" is `beta KL(q || m) + (1 - beta) KL(p || m)` with `m = beta q + (1 - beta) p`. There is no
    factor of `temperature ** 2`. Logits of both are made a few rows at a time. A scalar loss makes
    the gradients at once, as `fused_linear_cross_entropy` does. No gradient flows to the teacher.

    Args:
        x: The student's last hidden states, shape (T, H).
        weight: Rows of the student's output layer, shape (V, H), dtype of `x`.
        teacher: With `teacher_weight` the teacher's last hidden states, shape (T, any). Without it
            its logits, shape (T, V), or a function that takes a slice of rows and returns their
            logits (not under `torch.compile`; called again in a backward that computes again).
        teacher_weight: Rows of the teacher's output layer, shape (V, as `teacher`), or `None`.
        labels: Shape (T,), integer, of which only `ignore_index` matters; `None` counts all rows.
        direction: "student_teacher" (the run file's `forward`), "teacher_student" (its
            `backward`) or "jsd".
        beta: Share of the teacher in the mixture of "jsd", between 0 and 1.
        temperature: Divisor of both sides' logits, above 0.
        reduction: "none" for a divergence a row, "sum", or "mean" over the rows that are not
            ignored.
        ignore_index: Label of rows that cost nothing and get no gradient.
        grad_accum_dtype: Dtype in which the gradient of `weight` is summed over rows; `None` for
            that of `weight`.
        backend: Implementation to run; `None` takes the fastest one proven for `x`'s device.

    Returns:
        Shape (T,) for "none", else a scalar; at least float32. The mean over no rows is NaN.

    Raises:
        ValueError: If the shapes or dtypes do not fit or an option is out of range.
        UnsupportedBackendError: If `backend` is named and cannot serve the call.

    Source: Hinton et al. 2015 (arXiv:1503.02531); the generalised Jensen-Shannon divergence of
    Agarwal et al. 2023, equation 1 (arXiv:2306.13649).
    """
    check_linear(x, weight, labels)
    T, V = x.shape[0], weight.shape[0]
    provider: TeacherLogits | None = None
    tensors: tuple[Tensor, ...] = ()
    if not isinstance(teacher, Tensor):
        provider = teacher
        if teacher_weight is not None:
            raise ValueError("`teacher_weight` must be `None` where `teacher` gives logits")
    elif teacher_weight is None:
        if teacher.shape != (T, V):
            raise ValueError(
                f"`teacher` must have shape {(T, V)} where there is no `teacher_weight`, got "
                f"{tuple(teacher.shape)}: teacher and student share a vocabulary"
            )
        tensors = (teacher.detach(),)
    else:
        if (
            teacher.ndim != 2
            or teacher.shape[0] != T
            or teacher_weight.shape != (V, teacher.shape[1])
        ):
            raise ValueError(
                f"`teacher` and `teacher_weight` must have shapes ({T}, any) and ({V}, the same), "
                f"got {tuple(teacher.shape)} and {tuple(teacher_weight.shape)}: teacher and "
                "student share a vocabulary"
            )
        if teacher.dtype != teacher_weight.dtype:
            raise ValueError(
                f"`teacher_weight` must have the dtype {teacher.dtype} of `teacher`, got "
                f"{teacher_weight.dtype}"
            )
        tensors = (teacher.detach(), teacher_weight.detach())
    options = DivergenceOptions(
        direction, beta, temperature, reduction, ignore_index, provider=provider
    ).check()
    if labels is None:
        labels = torch.full((T,), ignore_index + 1, dtype=torch.int64, device=x.device)
    function = FUSED_LINEAR_KL_DIV.choose(backend, x, weight, *tensors)
    return function(x, weight, labels, tensors, options, sum_dtype(weight, grad_accum_dtype))
