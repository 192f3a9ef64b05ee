"""The norm of a recurrence's output and the gate on it."""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lme_core.layers.initialization import Constant, ParameterSpec
from lme_core.layers.normalization import normalize_parts
from lme_core.layers.settings import ModelSettings, Normalization
from lme_kernels.ops.gated_rmsnorm import GATED_RMSNORM
from lme_kernels.ops.layernorm import LAYERNORM
from lme_kernels.ops.p_norm import P_NORM
from lme_kernels.ops.rmsnorm import RMSNORM
from lme_kernels.policy import KernelPolicy


class GatedNorm(nn.Module):
    """norm(x * silu(gate)), or norm(x) * silu(gate)."""

    average_channels: Callable[[Tensor], Tensor] | None
    """Averages over the devices that have the other channels; `None`: all are here. Public so that
    it can be replaced."""

    def __init__(
        self,
        kind: Normalization | None,
        size: int,
        *,
        groups: int = 1,
        norm_before_gate: bool = False,
        settings: ModelSettings,
        kernels: KernelPolicy,
    ) -> None:
        """Allocate without initialising.

        Args:
            kind: Which norm; only "layernorm" has a bias; `None` for the gate alone.
            size: Width of the last dim.
            groups: Equal parts of the last dim that are normalised apart.
            norm_before_gate: Whether the gate multiplies what is normalised already.
            settings: The architecture.
            kernels: Which implementations run.
        """
        super().__init__()
        eps = settings.layer_norm_epsilon
        self.kind: Normalization | None = kind
        self.average_channels = None
        self.groups = groups
        self.group_size = size // groups
        self.eps = eps
        self.p = settings.p_norm_order
        self.norm_before_gate = norm_before_gate
        self.weight = nn.Parameter(torch.empty(size)) if kind is not None else None
        self.bias = nn.Parameter(torch.empty(size)) if kind == "layernorm" else None
        self.gated: Callable[..., Tensor] | None = None
        self.normalize: Callable[..., Tensor] | None = None
        match kind:
            case "rmsnorm":
                self.gated = partial(
                    kernels.bind(GATED_RMSNORM), eps=eps, norm_before_gate=norm_before_gate
                )
                self.normalize = partial(kernels.bind(RMSNORM), eps=eps)
            case "layernorm":
                self.normalize = partial(kernels.bind(LAYERNORM), eps=eps)
            case "p_norm":
                self.normalize = partial(kernels.bind(P_NORM), eps=eps, p=settings.p_norm_order)
            case None:
                pass

    def parameter_specs(self) -> Mapping[str, ParameterSpec]:
        """Specs of `weight` and `bias`, where there are any; neither is decayed."""
        specs = {}
        if self.weight is not None:
            specs["weight"] = ParameterSpec(Constant(1.0), weight_decay=False)
        if self.bias is not None:
            specs["bias"] = ParameterSpec(Constant(0.0), weight_decay=False)
        return specs

    def forward(self, x: Tensor, gate: Tensor | None) -> Tensor:
        """Normalise and gate.

        Args:
            x: Shape (..., size).
            gate: Shape (..., size), before the silu; `None` for no gate.

        Returns:
            Shape (..., size).
        """
        if self.groups == 1:
            if self.average_channels is None or self.kind is None:
                return self._gated(x, gate, self.weight, self.bias)
            norm = partial(
                normalize_parts,
                self.kind,
                average=self.average_channels,
                eps=self.eps,
                p=self.p,
                size=self.group_size,
            )
            return self._across_devices(x, gate, norm)
        # Whole groups are here, perhaps not all.
        parts = (-1, self.group_size)
        y = self._gated(
            x.unflatten(-1, parts), None if gate is None else gate.unflatten(-1, parts), None, None
        ).flatten(-2)
        # Scale and bias are of the whole width, so they come after.
        y = y if self.weight is None else y * self.weight
        return y if self.bias is None else y + self.bias

    def _gated(
        self, x: Tensor, gate: Tensor | None, weight: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        if gate is None:
            return self._norm(x, weight, bias)
        if self.gated is not None:
            return self.gated(x, gate, weight)
        if self.norm_before_gate:
            return self._norm(x, weight, bias) * F.silu(gate)
        return self._norm(x * F.silu(gate), weight, bias)

    def _norm(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        if self.normalize is None:
            return x
        if self.kind == "layernorm":
            return self.normalize(x, weight, bias)
        return self.normalize(x, weight)

    def _across_devices(
        self, x: Tensor, gate: Tensor | None, norm: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Normalise channels of which others are elsewhere, by `norm`, which knows of them."""
        compute = torch.promote_types(x.dtype, torch.float32)
        y = x.to(compute)
        opening = None if gate is None else F.silu(gate.to(compute))
        if opening is not None and not self.norm_before_gate:
            y = y * opening
        y = norm(y)
        y = y if self.weight is None else y * self.weight
        y = y if self.bias is None else y + self.bias
        if opening is not None and self.norm_before_gate:
            y = y * opening
        return y.to(x.dtype)
