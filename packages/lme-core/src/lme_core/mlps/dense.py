"""The dense MLP: two linear layers around an activation, gated or not."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from lme_core.layers.activation import Activation, check_activation, is_glu
from lme_core.layers.auxiliary import Auxiliary, no_auxiliary
from lme_core.layers.context import SequenceContext
from lme_core.layers.dropout import check_probability, dropout
from lme_core.layers.initialization import linear_std
from lme_core.layers.linear import GatedLinear, Linear
from lme_core.layers.settings import ModelSettings
from lme_core.mlps.base import MLP
from lme_kernels.policy import KernelPolicy

_OUTPUT_DROPOUT = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseMLPConfig:
    """Dense MLP."""

    mlp_type: Literal["MLP"] = "MLP"
    """Kind of MLP."""
    intermediate_size: int | None = None
    """Width between the two layers; absent: 4 times `hidden_size`."""
    activation_function: str = "gelu_pytorch_tanh"
    """Name of the activation; one that ends in `glu` is gated and doubles the first layer."""
    dropout: float = 0.0
    """Probability of dropping a channel of the output."""
    add_bias: bool = False
    """Whether the linear layers have biases."""

    def __post_init__(self) -> None:
        if self.intermediate_size is not None and self.intermediate_size < 1:
            raise ValueError(
                f"`intermediate_size` must be at least 1, got {self.intermediate_size}"
            )
        check_activation(self.activation_function)
        check_probability("dropout", self.dropout)

    def has_dropout(self) -> bool:
        """Say whether anything is dropped in training."""
        return self.dropout > 0

    def width(self, hidden_size: int) -> int:
        """Width between the two layers in a model of that width."""
        return 4 * hidden_size if self.intermediate_size is None else self.intermediate_size

    def forward_flops(self, settings: ModelSettings, sequence_length: int) -> float:
        """Floating-point operations of a forward pass, per token, of the matrix products."""
        width = self.width(settings.hidden_size)
        return 2.0 * settings.hidden_size * width * (3 if is_glu(self.activation_function) else 2)

    def inactive_parameters(self, settings: ModelSettings) -> int:
        """Parameters that a token does not use: none."""
        return 0

    def build(self, settings: ModelSettings, layer: int, kernels: KernelPolicy) -> "MLP":
        """Build the module of one layer.

        Args:
            settings: The architecture.
            layer: Index of the layer.
            kernels: Which implementations run.
        """
        kind = GatedMLP if is_glu(self.activation_function) else PlainMLP
        return kind(self, settings, kernels)


class PlainMLP(MLP):
    """down(f(up(x)))."""

    shard_plan: ClassVar[Mapping[str, str] | None] = {"up": "column", "down": "row"}

    def __init__(
        self, config: DenseMLPConfig, settings: ModelSettings, kernels: KernelPolicy
    ) -> None:
        """Allocate without initialising."""
        super().__init__()
        H, width = settings.hidden_size, config.width(settings.hidden_size)
        self.config = config
        self.shard_units = {"intermediate_size": width}
        self.up = Linear(H, width, bias=config.add_bias, std=linear_std(settings, H), mup=True)
        self.down = _down(config, settings, width)
        self.activation = Activation(config.activation_function, kernels)

    def forward(self, x: Tensor, context: SequenceContext) -> tuple[Tensor, Auxiliary]:
        """Transform each token; see `MLP`."""
        y = self.down(self.activation(self.up(x)))
        return _drop(y, self.config, context), no_auxiliary()


class GatedMLP(MLP):
    """down(up(x) * f(gate(x))), gate and up in one layer of interleaved rows."""

    shard_plan: ClassVar[Mapping[str, str] | None] = {"gate_up": "column", "down": "row"}

    def __init__(
        self, config: DenseMLPConfig, settings: ModelSettings, kernels: KernelPolicy
    ) -> None:
        """Allocate without initialising."""
        super().__init__()
        H, width = settings.hidden_size, config.width(settings.hidden_size)
        self.config = config
        self.shard_units = {"intermediate_size": width}
        self.gate_up = GatedLinear(
            H, 2 * width, bias=config.add_bias, std=linear_std(settings, H), mup=True
        )
        self.down = _down(config, settings, width)
        self.activation = Activation(config.activation_function, kernels)

    def forward(self, x: Tensor, context: SequenceContext) -> tuple[Tensor, Auxiliary]:
        """Transform each token; see `MLP`."""
        y = self.activation(self.gate_up(x), self.gate_up.layout(x))
        return _drop(self.down(y), self.config, context), no_auxiliary()


def _down(config: DenseMLPConfig, settings: ModelSettings, width: int) -> Linear:
    std = linear_std(settings, width, output=True)
    return Linear(width, settings.hidden_size, bias=config.add_bias, std=std, mup=True)


def _drop(y: Tensor, config: DenseMLPConfig, context: SequenceContext) -> Tensor:
    if context.dropout_key is None or context.token_index is None:
        return y
    return dropout(y, config.dropout, context.dropout_key, _OUTPUT_DROPOUT, context.token_index)
