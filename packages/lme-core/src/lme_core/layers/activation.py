"""Activation functions by name, and the gated linear units made of them."""

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lme_core.layers.initialization import Constant, ParameterSpec
from lme_kernels.ops.geglu import GEGLU
from lme_kernels.ops.relu_squared import RELU_SQUARED
from lme_kernels.ops.swiglu_packed import SWIGLU_PACKED
from lme_kernels.policy import KernelPolicy

Function = Callable[[Tensor], Tensor]
Layout = Literal["interleaved", "concatenated"]

_RRELU_BOUNDS = (1 / 8, 1 / 3)


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _identity(x: Tensor) -> Tensor:
    return x


def _rrelu(x: Tensor) -> Tensor:
    # The expected slope, as torch takes it in evaluation: a random one would need a generator.
    return F.leaky_relu(x, sum(_RRELU_BOUNDS) / 2)


_FUNCTIONS: Mapping[str, Function] = MappingProxyType(
    {
        "celu": F.celu,
        "elu": F.elu,
        "gelu": F.gelu,
        "gelu_pytorch_tanh": _gelu_tanh,
        "selu": F.selu,
        "hard_shrink": F.hardshrink,
        "hard_sigmoid": F.hardsigmoid,
        "hard_swish": F.hardswish,
        "hard_tanh": F.hardtanh,
        "identity": _identity,
        "leaky_reLU": F.leaky_relu,
        "log_sigmoid": F.logsigmoid,
        "mish": F.mish,
        "relu": F.relu,
        "relu6": F.relu6,
        "rrelu": _rrelu,
        "sigmoid": torch.sigmoid,
        "silu": F.silu,
        "softplus": F.softplus,
        "soft_shrink": F.softshrink,
        "soft_sign": F.softsign,
        "tanh": torch.tanh,
        "tanh_shrink": F.tanhshrink,
    }
)
_ALIASES: Mapping[str, str] = MappingProxyType(
    {"relu2": "relu_squared", "swish": "silu", "soft_plus": "softplus"}
)
_GLU_BASES: Mapping[str, str] = MappingProxyType(
    {
        "glu": "sigmoid",
        "ceglu": "celu",
        "eglu": "elu",
        "geglu": "gelu",
        "miglu": "mish",
        "mishglu": "mish",
        "preglu": "prelu",
        "reglu": "relu",
        "rreglu": "rrelu",
        "seglu": "selu",
        "swiglu": "silu",
    }
)
_BASES = (*_FUNCTIONS, "prelu", "relu_squared", *_ALIASES)
ACTIVATIONS = (*_BASES, *_GLU_BASES, *(f"{base}_glu" for base in _BASES))


def is_glu(name: str) -> bool:
    """Say whether an activation takes a gate beside its input."""
    return name.endswith("glu")


def check_activation(name: str) -> None:
    """Refuse an unknown activation.

    Raises:
        ValueError: If there is none called `name`; the message says which is close.
    """
    if name in ACTIVATIONS:
        return
    close = get_close_matches(name, ACTIVATIONS, n=1)
    hint = f"; did you mean `{close[0]}`?" if close else ""
    raise ValueError(
        f"`activation_function` is `{name}`, which does not exist{hint} Known: "
        f"{', '.join(_BASES)}; {', '.join(_GLU_BASES)}; and any of the first with `_glu` after it"
    )


def base_of(name: str) -> str:
    """Name the function inside an activation, without aliases: that of the gate of a GLU.

    Raises:
        ValueError: If there is no activation called `name`.
    """
    check_activation(name)
    base = _GLU_BASES.get(name) or name.removesuffix("_glu")
    return _ALIASES.get(base, base)


class Activation(nn.Module):
    """An activation function by name, gated or not."""

    def __init__(self, name: str, kernels: KernelPolicy) -> None:
        """Choose the function.

        Args:
            name: One of `ACTIVATIONS`.
            kernels: Which implementations run.

        Raises:
            ValueError: If there is no activation of that name.
        """
        super().__init__()
        base = base_of(name)
        self.gated = is_glu(name)
        self.weight = nn.Parameter(torch.empty(1)) if base == "prelu" else None
        self.packed: Callable[..., Tensor] | None = None
        self.gated_function: Callable[[Tensor, Tensor], Tensor] | None = None
        if self.gated and base == "silu":
            self.packed = kernels.bind(SWIGLU_PACKED)
        elif self.gated and base == "gelu":
            self.gated_function = kernels.bind(GEGLU)
        self.function = (
            kernels.bind(RELU_SQUARED) if base == "relu_squared" else _FUNCTIONS.get(base)
        )

    def parameter_specs(self) -> Mapping[str, ParameterSpec]:
        """Spec of the slope of `prelu`, the only parameter that an activation has."""
        if self.weight is None:
            return {}
        return {"weight": ParameterSpec(Constant(0.25), weight_decay=False)}

    def forward(self, x: Tensor, layout: Layout = "interleaved") -> Tensor:
        """Apply the function.

        Args:
            x: Shape (..., width), or (..., 2 * width) with a gate.
            layout: Which channels are the gate: the even ones, or the first half.

        Returns:
            Shape (..., width): f(x), or up * f(gate).
        """
        if not self.gated:
            return self._base(x)
        if self.packed is not None:
            return self.packed(x, layout=layout)
        if layout == "interleaved":
            gate, up = x[..., 0::2], x[..., 1::2]
        else:
            gate, up = x.chunk(2, dim=-1)
        if self.gated_function is not None:
            return self.gated_function(gate, up)
        return up * self._base(gate)

    def _base(self, x: Tensor) -> Tensor:
        if self.weight is not None:
            return F.prelu(x, self.weight)
        if self.function is None:
            raise RuntimeError("an activation is a function or has a weight")
        return self.function(x)
