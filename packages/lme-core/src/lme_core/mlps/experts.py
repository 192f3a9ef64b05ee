"""Experts: MLPs side by side, of which each token passes through the few that it was sent to."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lme_core.layers.activation import Activation, base_of, is_glu
from lme_core.layers.initialization import Constant, Normal, ParameterSpec
from lme_kernels.ops.scattermoe import SCATTERMOE
from lme_kernels.policy import KernelPolicy

# What the op calls the activations that it has, by base function and whether there is a gate.
_FUSED: Mapping[tuple[str, bool], str] = MappingProxyType(
    {
        ("silu", True): "swiglu",
        ("gelu", True): "geglu",
        ("relu", True): "reglu",
        ("sigmoid", True): "sigmoid_glu",
        ("silu", False): "silu",
        ("gelu", False): "gelu",
        ("gelu_pytorch_tanh", False): "gelu_pytorch_tanh",
        ("relu", False): "relu",
        ("relu_squared", False): "relu_squared",
    }
)


class ExpertLinear(nn.Module):
    """The linear layers of all experts in one tensor; `Experts` multiplies with them."""

    def __init__(
        self, num_experts: int, in_features: int, out_features: int, *, bias: bool, std: float
    ) -> None:
        """Allocate without initialising.

        Args:
            num_experts: Number of experts.
            in_features: Inputs of each.
            out_features: Outputs of each.
            bias: Whether each has one.
            std: Standard deviation of the initial weights.
        """
        super().__init__()
        self.std = std
        self.weight = nn.Parameter(torch.empty(num_experts, out_features, in_features))
        self.bias = nn.Parameter(torch.empty(num_experts, out_features)) if bias else None

    def parameter_specs(self) -> Mapping[str, ParameterSpec]:
        """Specs of `weight` and, where there is one, `bias`."""
        specs = {"weight": ParameterSpec(Normal(self.std), mup=True)}
        if self.bias is not None:
            specs["bias"] = ParameterSpec(Constant(0.0), weight_decay=False)
        return specs


class Experts(nn.Module):
    """down(f(up(x))) or down(up(x) * f(gate(x))) of each token's experts, weighted and added."""

    shard_plan: ClassVar[Mapping[str, str] | None] = {
        "gate_up": "expert_column",
        "up": "expert_column",
        "down": "expert_row",
    }
    """Dim 0 is by experts; dim 1 of the first and dim 2 of the second layer are the width of each,
    in the first with even rows for the gate and odd ones for its partner."""

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        width: int,
        *,
        activation: str,
        bias: bool,
        up_std: float,
        down_std: float,
        kernels: KernelPolicy,
    ) -> None:
        """Allocate without initialising.

        Args:
            num_experts: Number of experts.
            hidden_size: Width of the tokens.
            width: Width of each expert between its two layers.
            activation: Name of the activation, as of a dense MLP.
            bias: Whether the layers have biases.
            up_std: Standard deviation of the first layer's initial weights.
            down_std: The second layer's.
            kernels: Which implementations run.
        """
        super().__init__()
        self.shard_units = {"intermediate_size": width}
        gated = is_glu(activation)
        first = ExpertLinear(
            num_experts, hidden_size, width * (2 if gated else 1), bias=bias, std=up_std
        )
        self.gate_up = first if gated else None
        self.up = None if gated else first
        self.down = ExpertLinear(num_experts, width, hidden_size, bias=bias, std=down_std)
        self.fused_name = _FUSED.get((base_of(activation), gated))
        # Public so that a second layer cut over devices can add its bias once.
        self.fused: Callable[..., Tensor] = kernels.bind(SCATTERMOE)
        self.activation = Activation(activation, kernels) if self.fused_name is None else None

    def forward(self, x: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        """Add up the outputs of each token's experts.

        Args:
            x: Shape (T, H).
            weights: Shape (T, k).
            indices: Chosen among the experts that are here, shape (T, k).

        Returns:
            Shape (T, H), dtype of `x`.
        """
        first = self.up if self.gate_up is None else self.gate_up
        if first is None:
            raise RuntimeError("experts have a first layer")
        if self.activation is not None:
            return _one_by_one(x, weights, indices, first, self.down, self.activation)
        return self.fused(
            x,
            weights,
            indices,
            first.weight,
            self.down.weight,
            activation=self.fused_name,
            up_bias=first.bias,
            down_bias=self.down.bias,
        )


def _one_by_one(
    x: Tensor,
    weights: Tensor,
    indices: Tensor,
    up: ExpertLinear,
    down: ExpertLinear,
    activation: Activation,
) -> Tensor:
    """Serve the activations that no fused op has.

    Every expert sees every token, so that no shape depends on the choice and nothing waits for the
    device; sums are taken in at least float32.
    """
    compute = torch.promote_types(x.dtype, torch.float32)
    total = torch.zeros_like(x, dtype=compute)
    for expert in range(up.weight.shape[0]):
        h = F.linear(x, up.weight[expert], None if up.bias is None else up.bias[expert])
        bias = None if down.bias is None else down.bias[expert]
        y = F.linear(activation(h), down.weight[expert], bias)
        share = torch.where(indices == expert, weights, 0.0).sum(dim=-1, keepdim=True)
        total = total + share.to(compute) * y.to(compute)
    return total.to(x.dtype)
