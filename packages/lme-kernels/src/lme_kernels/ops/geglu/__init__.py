"""Gated linear unit with the exact GELU."""

from torch import Tensor

from lme_kernels.op import Backend, Op
from lme_kernels.ops.geglu import reference

GEGLU = Op(
    name="geglu",
    reference=reference.geglu,
    implementations={Backend.TRITON: "lme_kernels.ops.geglu._triton"},
    traced=True,
)


def geglu(gate: Tensor, up: Tensor, *, backend: Backend | str | None = None) -> Tensor:
    """Multiply `up` by an activation of `gate`: `gelu(gate) * up`.

    Args:
        gate: Input of the activation, any shape.
        up: Factor, shape and dtype of `gate`.
        backend: Implementation to run; `None` takes the fastest one proven for `gate`'s device.

    Returns:
        Shape and dtype of `gate`; computed in at least float32 and rounded once.

    Raises:
        ValueError: If `up` does not have the shape and dtype of `gate`.
        UnsupportedBackendError: If `backend` is named and cannot serve the call.

    Source: Shazeer 2020, equation 6 (arXiv:2002.05202); GELU with the error function.
    """
    if up.shape != gate.shape or up.dtype != gate.dtype:
        raise ValueError(
            f"`up` must have the shape {tuple(gate.shape)} and dtype {gate.dtype} of `gate`, got "
            f"{tuple(up.shape)} and {up.dtype}"
        )
    return GEGLU.choose(backend, gate, up)(gate, up)
