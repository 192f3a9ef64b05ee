"""Squared rectifier."""

from torch import Tensor

from lme_kernels.op import Backend, Op
from lme_kernels.ops.relu_squared import reference

RELU_SQUARED = Op(
    name="relu_squared",
    reference=reference.relu_squared,
    implementations={Backend.TRITON: "lme_kernels.ops.relu_squared._triton"},
    traced=True,
)


def relu_squared(x: Tensor, *, backend: Backend | str | None = None) -> Tensor:
    """Square the positive part of `x`: `max(x, 0) ** 2`.

    Args:
        x: Activations, any shape.
        backend: Implementation to run; `None` takes the fastest one proven for `x`'s device.

    Returns:
        Shape and dtype of `x`; computed in at least float32 and rounded once.

    Raises:
        UnsupportedBackendError: If `backend` is named and cannot serve the call.

    Source: So et al. 2021, section 4 (arXiv:2109.08668).
    """
    return RELU_SQUARED.choose(backend, x)(x)
