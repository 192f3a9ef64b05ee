"""Root mean square normalisation."""

from torch import Tensor

from lme_kernels.op import Backend, Op
from lme_kernels.ops.rmsnorm import reference

RMSNORM = Op(
    name="rmsnorm",
    reference=reference.rmsnorm,
    implementations={
        Backend.TRITON: "lme_kernels.ops.rmsnorm._triton",
        Backend.PALLAS: "lme_kernels.ops.rmsnorm._pallas",
    },
    # Runs when named: not yet proven on a TPU.
    manual=frozenset({Backend.PALLAS}),
)


def rmsnorm(
    x: Tensor, weight: Tensor | None, *, eps: float = 1e-6, backend: Backend | str | None = None
) -> Tensor:
    """Divide each row of `x` by its root mean square, then scale it.

    Args:
        x: Activations, shape (..., hidden).
        weight: Scale, shape (hidden,); `None` for no scale.
        eps: Added to the mean square, in units of `x` squared.
        backend: Implementation to run; `None` takes the fastest one proven for `x`'s device.

    Returns:
        Shape (..., hidden), dtype of `x`. Computed in at least float32 and rounded once, after the
        scale.

    Raises:
        ValueError: If `weight` does not have shape (hidden,).
        UnsupportedBackendError: If `backend` is named and cannot serve the call.

    Source: Zhang and Sennrich 2019, equation 4 (arXiv:1910.07467).
    """
    if weight is not None and weight.shape != x.shape[-1:]:
        expected, got = tuple(x.shape[-1:]), tuple(weight.shape)
        raise ValueError(f"`weight` must have shape {expected} to match `x`, got {got}")
    return RMSNORM.choose(backend, x, weight)(x, weight, eps)
