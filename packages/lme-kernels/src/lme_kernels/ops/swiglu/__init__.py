"""Gated linear unit with SiLU."""

from torch import Tensor

from lme_kernels.op import Backend, Op
from lme_kernels.ops.swiglu import reference

SWIGLU = Op(
    name="swiglu",
    reference=reference.swiglu,
    implementations={
        Backend.TRITON: "lme_kernels.ops.swiglu._triton",
        Backend.CUDA: "lme_kernels.ops.swiglu._cuda",
        Backend.PALLAS: "lme_kernels.ops.swiglu._pallas",
        Backend.NKI: "lme_kernels.ops.swiglu._nki",
    },
    # Run when named: not yet proven on a TPU or on Trainium.
    manual=frozenset({Backend.PALLAS, Backend.NKI}),
    traced=True,
)


def swiglu(gate: Tensor, up: Tensor, *, backend: Backend | str | None = None) -> Tensor:
    """Multiply `up` by an activation of `gate`: `silu(gate) * up`.

    Args:
        gate: Input of the activation, any shape.
        up: Factor, shape and dtype of `gate`.
        backend: Implementation to run; `None` takes the fastest one proven for `gate`'s device.

    Returns:
        Shape and dtype of `gate`; computed in at least float32 and rounded once.

    Raises:
        ValueError: If `up` does not have the shape and dtype of `gate`.
        UnsupportedBackendError: If `backend` is named and cannot serve the call.

    Source: Shazeer 2020, equation 6 (arXiv:2002.05202).
    """
    if up.shape != gate.shape or up.dtype != gate.dtype:
        raise ValueError(
            f"`up` must have the shape {tuple(gate.shape)} and dtype {gate.dtype} of `gate`, got "
            f"{tuple(up.shape)} and {up.dtype}"
        )
    return SWIGLU.choose(backend, gate, up)(gate, up)
