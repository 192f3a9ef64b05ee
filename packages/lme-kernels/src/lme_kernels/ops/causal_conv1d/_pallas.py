"""Depthwise causal convolution in Pallas, for tensors on XLA devices."""

from torch import Tensor

from lme_kernels import pallas
from lme_kernels._pallas_torch import call, why_not

__all__ = ["causal_conv1d", "why_not"]


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
) -> Tensor:
    tensors = {
        "x": x,
        "weight": weight,
        "bias": bias,
        "initial_state": initial_state,
        "cu_seqlens": cu_seqlens,
    }
    return call(pallas.causal_conv1d, tensors, activation="silu" if silu else None)[0]
