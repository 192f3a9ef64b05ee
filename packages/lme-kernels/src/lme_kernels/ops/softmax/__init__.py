"""Softmax over the last dimension."""

from torch import Tensor

from lme_kernels.op import Backend, Op
from lme_kernels.ops.softmax import reference

SOFTMAX = Op(
    name="softmax",
    reference=reference.softmax,
    implementations={Backend.TRITON: "lme_kernels.ops.softmax._triton"},
)


def softmax(
    x: Tensor,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    backend: Backend | str | None = None,
) -> Tensor:
    """Turn each row of `x` into probabilities: `softmax(softcap * tanh(scale * x / softcap))`.

    Args:
        x: Scores, shape (..., classes).
        scale: Factor of the scores.
        softcap: Bound on the scaled scores' magnitude, above 0; `None` for no bound.
        backend: Implementation to run; `None` takes the fastest one proven for `x`'s device.

    Returns:
        Shape (..., classes), dtype of `x`; computed in at least float32 with the row's maximum
        subtracted. A score of -inf has probability 0; a row of only -inf gives NaN.

    Raises:
        ValueError: If `softcap` is not above 0.
        UnsupportedBackendError: If `backend` is named and cannot serve the call.

    Source: `torch.softmax`, which it agrees with; the bound is Gemma 2's (arXiv:2408.00118).
    """
    if softcap is not None and softcap <= 0:
        raise ValueError(f"`softcap` must be above 0 (or `None` for no bound), got {softcap}")
    return SOFTMAX.choose(backend, x)(x, scale, softcap)
