"""Norms by name, over the ops of lme-kernels."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import overload

import torch
from torch import Tensor, nn

from lme_core.layers.initialization import Constant, ParameterSpec
from lme_core.layers.settings import ModelSettings, Normalization
from lme_kernels.ops.fused_residual_add_rmsnorm import FUSED_RESIDUAL_ADD_RMSNORM
from lme_kernels.ops.layernorm import LAYERNORM
from lme_kernels.ops.p_norm import P_NORM
from lme_kernels.ops.rmsnorm import RMSNORM
from lme_kernels.policy import KernelPolicy


class Norm(nn.Module):
    """Normalisation of the last dim with a learned scale, alone or after a residual addition."""

    average_channels: Callable[[Tensor], Tensor] | None
    """Averages over the devices that have the other channels; `None`: all are here. Public so that
    it can be replaced."""

    def __init__(
        self,
        kind: Normalization,
        size: int,
        *,
        eps: float,
        p: float = 2.0,
        zero_centered: bool = False,
        kernels: KernelPolicy,
    ) -> None:
        """Allocate without initialising.

        Args:
            kind: Which norm; only "layernorm" has a bias.
            size: Width of the last dim.
            eps: Epsilon, in the units that each norm documents.
            p: Order of "p_norm".
            zero_centered: Whether `weight` is the distance of the factors from 1.
            kernels: Which implementation runs.
        """
        super().__init__()
        self.kind: Normalization = kind
        self.average_channels = None
        self.size = size
        self.eps = eps
        self.p = p
        self.zero_centered = zero_centered
        self.weight = nn.Parameter(torch.empty(size))
        self.bias = nn.Parameter(torch.empty(size)) if kind == "layernorm" else None
        match kind:
            case "rmsnorm":
                self.normalize = partial(kernels.bind(RMSNORM), eps=eps)
            case "layernorm":
                self.normalize = partial(kernels.bind(LAYERNORM), eps=eps)
            case "p_norm":
                self.normalize = partial(kernels.bind(P_NORM), eps=eps, p=p)
        self.add_rmsnorm = kernels.bind(FUSED_RESIDUAL_ADD_RMSNORM)

    def parameter_specs(self) -> Mapping[str, ParameterSpec]:
        """Specs of `weight` and, where there is one, `bias`; neither is decayed."""
        specs = {
            "weight": ParameterSpec(
                Constant(0.0 if self.zero_centered else 1.0), weight_decay=False
            )
        }
        if self.bias is not None:
            specs["bias"] = ParameterSpec(Constant(0.0), weight_decay=False)
        return specs

    def factors(self) -> Tensor:
        """Give what channels are multiplied by once they are normalised.

        Returns:
            Shape (size,); in at least float32 where 1 was added, which a bfloat16 would round.
        """
        if not self.zero_centered:
            return self.weight
        return 1.0 + self.weight.to(torch.promote_types(self.weight.dtype, torch.float32))

    @overload
    def forward(self, x: Tensor) -> Tensor: ...
    @overload
    def forward(self, x: Tensor, residual: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]: ...
    def forward(
        self, x: Tensor, residual: Tensor | None = None, scale: float = 1.0
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Normalise `x`, or `residual + scale * x`.

        Args:
            x: Activations, shape (..., size).
            residual: Residual stream to add `x` to, shape and dtype of `x`.
            scale: Factor of `x` in the sum.

        Returns:
            The normalised tensor; with a `residual` that of the sum, and the sum itself.
        """
        if residual is None:
            return self._norm(x)
        if self.kind == "rmsnorm" and self.average_channels is None:
            return self.add_rmsnorm(x, residual, self.factors(), eps=self.eps, scale=scale)
        total = residual + (x if scale == 1.0 else scale * x)
        return self._norm(total), total

    def _norm(self, x: Tensor) -> Tensor:
        if self.average_channels is not None:
            y = normalize_parts(
                self.kind, x, self.average_channels, eps=self.eps, p=self.p, size=self.size
            )
            y = y * self.factors()
            return (y if self.bias is None else y + self.bias).to(x.dtype)
        if self.bias is not None:
            return self.normalize(x, self.factors(), self.bias)
        return self.normalize(x, self.factors())


def normalize_parts(
    kind: Normalization,
    x: Tensor,
    average: Callable[[Tensor], Tensor],
    *,
    eps: float,
    p: float,
    size: int,
) -> Tensor:
    """Normalise channels of which others are on other devices, without scale and bias.

    Args:
        kind: Which norm.
        x: Channels that are here, shape (..., C), as many on each device.
        average: Averages a tensor over the devices, with its gradient.
        eps: As of `Norm`.
        p: Order of "p_norm".
        size: Channels on all devices.

    Returns:
        Shape (..., C), in at least float32.
    """
    y = x.to(torch.promote_types(x.dtype, torch.float32))
    if kind == "p_norm":
        mean = average(y.abs().pow(p).mean(-1, keepdim=True))
        # Bounded before the root, whose slope at zero is infinite.
        least = max(eps**p, torch.finfo(y.dtype).tiny)
        return y / (mean * size).clamp(min=least).pow(1.0 / p).clamp(min=eps)
    if kind == "layernorm":
        y = y - average(y.mean(-1, keepdim=True))
    return y * torch.rsqrt(average(y.square().mean(-1, keepdim=True)) + eps)


def build_norm(settings: ModelSettings, size: int, kernels: KernelPolicy) -> Norm:
    """Build a norm of the architecture's kind.

    Args:
        settings: The architecture.
        size: Width of the last dim.
        kernels: Which implementation runs.
    """
    return Norm(
        settings.normalization_function,
        size,
        eps=settings.layer_norm_epsilon,
        p=settings.p_norm_order,
        zero_centered=settings.zero_centered_norms,
        kernels=kernels,
    )


def build_head_norm(settings: ModelSettings, size: int, kernels: KernelPolicy) -> Norm:
    """Build an RMS norm of queries or keys.

    Args:
        settings: The architecture.
        size: Channels that are normalised together.
        kernels: Which implementation runs.
    """
    return Norm(
        "rmsnorm",
        size,
        eps=settings.layer_norm_epsilon,
        zero_centered=settings.zero_centered_norms,
        kernels=kernels,
    )
