"""Normalisation by the p-norm of a row."""

from torch import Tensor

from lme_kernels.op import Backend, Op
from lme_kernels.ops.p_norm import reference

P_NORM = Op(
    name="p_norm",
    reference=reference.p_norm,
    implementations={Backend.TRITON: "lme_kernels.ops.p_norm._triton"},
)


def p_norm(
    x: Tensor,
    weight: Tensor | None = None,
    *,
    p: float = 2.0,
    eps: float = 1e-6,
    backend: Backend | str | None = None,
) -> Tensor:
    """Divide each row of `x` by its p-norm, then scale it: `weight * x / max(|x|_p, eps)`.

    Args:
        x: Activations, shape (..., hidden).
        weight: Scale, shape (hidden,); `None` for no scale.
        p: Order of the norm, at least 1 and finite.
        eps: Least value of the divisor, in units of `x`.
        backend: Implementation to run; `None` takes the fastest one proven for `x`'s device.

    Returns:
        Shape (..., hidden), dtype of `x`; computed in at least float32 and rounded once. A row
        whose norm is below `eps` is divided by `eps`, a constant to the gradient too.

    Raises:
        ValueError: If `weight` does not have shape (hidden,), or `p` is below 1 or infinite.
        UnsupportedBackendError: If `backend` is named and cannot serve the call.

    Source: `torch.nn.functional.normalize`, which it agrees with.
    """
    if not 1.0 <= p < float("inf"):
        raise ValueError(f"`p` must be at least 1 and finite, got {p}")
    if weight is not None and weight.shape != x.shape[-1:]:
        expected, got = tuple(x.shape[-1:]), tuple(weight.shape)
        raise ValueError(f"`weight` must have shape {expected} to match `x`, got {got}")
    return P_NORM.choose(backend, x, weight)(x, weight, p, eps)
