"""Gated linear unit of a packed tensor in plain torch."""

from torch import Tensor

from lme_kernels.ops.swiglu.reference import swiglu


def swiglu_packed(x: Tensor, layout: str) -> Tensor:
    if layout == "interleaved":
        return swiglu(x[..., 0::2], x[..., 1::2])
    gate, up = x.chunk(2, dim=-1)
    return swiglu(gate, up)
