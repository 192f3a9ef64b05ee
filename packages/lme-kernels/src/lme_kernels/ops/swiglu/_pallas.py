"""Gated linear unit with SiLU in Pallas, for tensors on XLA devices."""

from torch import Tensor

from lme_kernels import pallas
from lme_kernels._pallas_torch import call, why_not

__all__ = ["swiglu", "why_not"]


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return call(pallas.swiglu, {"gate": gate, "up": up})[0]
