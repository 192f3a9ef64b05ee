"""Activations that experts can have: names as run files write them."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn import functional as F

from lme_kernels.precision import compute_dtype


@dataclass(frozen=True, slots=True)
class Activation:
    """What an expert does between its two products."""

    function: str
    """Name of the function of one number: "silu", "gelu", "gelu_tanh", "relu", "sigmoid" or
    "relu_squared"."""
    gated: bool
    """Whether it is applied to gates, which multiply as many other channels."""


ACTIVATIONS: Mapping[str, Activation] = MappingProxyType(
    {
        "swiglu": Activation("silu", gated=True),
        "geglu": Activation("gelu", gated=True),
        "reglu": Activation("relu", gated=True),
        "glu": Activation("sigmoid", gated=True),
        "sigmoid_glu": Activation("sigmoid", gated=True),
        "silu": Activation("silu", gated=False),
        "swish": Activation("silu", gated=False),
        "gelu": Activation("gelu", gated=False),
        "gelu_pytorch_tanh": Activation("gelu_tanh", gated=False),
        "relu": Activation("relu", gated=False),
        "relu_squared": Activation("relu_squared", gated=False),
        "relu2": Activation("relu_squared", gated=False),
    }
)


def activate(x: Tensor, activation: Activation) -> Tensor:
    """Apply an activation to pre-activations, gates in the even channels.

    Args:
        x: Shape (..., U).
        activation: Which one.

    Returns:
        Shape (..., U / 2) if gated, else (..., U), dtype of `x`; rounded once.
    """
    compute = x.to(compute_dtype(x.dtype))
    if activation.gated:
        y = _function(compute[..., 0::2], activation.function) * compute[..., 1::2]
    else:
        y = _function(compute, activation.function)
    return y.to(x.dtype)


def _function(x: Tensor, name: str) -> Tensor:
    if name == "silu":
        return F.silu(x)
    if name == "gelu":
        return F.gelu(x)
    if name == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    if name == "relu":
        return F.relu(x)
    if name == "relu_squared":
        return F.relu(x).square()
    return torch.sigmoid(x)
