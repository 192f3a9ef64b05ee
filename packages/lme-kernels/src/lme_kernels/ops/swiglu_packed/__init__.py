"""Gated linear unit with SiLU, of one tensor that holds gate and up."""

from typing import Literal

from torch import Tensor

from lme_kernels.op import Backend, Op
from lme_kernels.ops.swiglu_packed import reference

SWIGLU_PACKED = Op(
    name="swiglu_packed",
    reference=reference.swiglu_packed,
    implementations={
        Backend.TRITON: "lme_kernels.ops.swiglu_packed._triton",
        Backend.CUDA: "lme_kernels.ops.swiglu_packed._cuda",
    },
    traced=True,
)

Layout = Literal["interleaved", "concatenated"]


def swiglu_packed(
    x: Tensor, *, layout: Layout = "interleaved", backend: Backend | str | None = None
) -> Tensor:
    """Multiply one half of `x` by the SiLU of the other: `silu(gate) * up`.

    Args:
        x: Gate and up in one tensor, shape (..., 2 * width).
        layout: Which channels are the gate: "interleaved" the even ones (rows of the weight can
            then be cut anywhere), "concatenated" the first half.
        backend: Implementation to run; `None` takes the fastest one proven for `x`'s device.

    Returns:
        Shape (..., width), dtype of `x`; computed in at least float32 and rounded once.

    Raises:
        ValueError: If `x` has an odd number of channels, or there is no such layout.
        UnsupportedBackendError: If `backend` is named and cannot serve the call.

    Source: Shazeer 2020, equation 6 (arXiv:2002.05202).
    """
    if x.shape[-1] % 2:
        raise ValueError(f"`x` must have an even number of channels, got {x.shape[-1]}")
    if layout not in ("interleaved", "concatenated"):
        raise ValueError(f'`layout` must be "interleaved" or "concatenated", got {layout!r}')
    return SWIGLU_PACKED.choose(backend, x)(x, layout)
