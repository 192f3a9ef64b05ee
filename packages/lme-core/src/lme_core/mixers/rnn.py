"""The recurrence of Elman, with a matrix a head, a gate and a norm."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from lme_core.layers.settings import ModelSettings
from lme_core.mixers.checks import common_heads
from lme_core.mixers.recurrent import Sequences
from lme_core.mixers.vector_recurrence import VectorRecurrence, VectorRecurrenceFields
from lme_kernels.ops.rnn import RNN as RNN_OP
from lme_kernels.policy import KernelPolicy


@dataclass(frozen=True, slots=True, kw_only=True)
class RNNConfig(VectorRecurrenceFields):
    """h_t = tanh(h_{t-1} W + x_t) in every head."""

    sequence_mixer_type: Literal["rnn"] = "rnn"
    """Kind of mixer."""
    num_input_heads: int
    """Heads of inputs; each serves as many heads of the recurrence as there are more weights."""
    num_weight_heads: int
    """Heads with a matrix of their own; each serves as many heads as there are more inputs."""

    def __post_init__(self) -> None:
        self.check_fields()
        self.num_heads()

    def head_counts(self) -> Mapping[str, int]:
        """Numbers of heads by their settings' names."""
        return {"num_input_heads": self.num_input_heads, "num_weight_heads": self.num_weight_heads}

    def num_heads(self) -> int:
        """Heads of the recurrence.

        Raises:
            ValueError: If a number of heads does not divide it.
        """
        return common_heads(self.head_counts())

    def forward_flops(self, settings: ModelSettings, sequence_length: int) -> float:
        """Floating-point operations of a forward pass, per token, of the products.

        Args:
            settings: The architecture.
            sequence_length: Tokens of a document; each costs the same.
        """
        return self.products(settings.hidden_size, [self.num_input_heads], 1, self.num_heads())

    def build(self, settings: ModelSettings, layer: int, kernels: KernelPolicy) -> "RNN":
        """Build the module of one layer.

        Args:
            settings: The architecture.
            layer: Index of the layer.
            kernels: Which implementations run.
        """
        return RNN(self, settings, kernels)


class RNN(VectorRecurrence):
    """Recurrence of Elman in every head."""

    def __init__(self, config: RNNConfig, settings: ModelSettings, kernels: KernelPolicy) -> None:
        """Allocate without initialising.

        Args:
            config: What this layer is.
            settings: The architecture.
            kernels: Which implementations run.
        """
        super().__init__(
            config,
            settings,
            kernels,
            input_heads=[config.num_input_heads],
            weight_heads=[config.num_weight_heads],
        )
        self.rnn = kernels.bind(RNN_OP)

    def scan(
        self,
        inputs: Sequence[Tensor],
        weights: Sequence[Tensor],
        initial: Tensor | None,
        sequences: Sequences,
    ) -> tuple[Tensor, Tensor]:
        """Run the recurrence; see `VectorRecurrence`."""
        return self.rnn(
            inputs[0],
            weights[0],
            initial_state=initial,
            cu_seqlens=sequences.cu_seqlens,
            max_seqlen=sequences.max_seqlen(),
            gradient_clipping=self.gradient_clipping,
        )
