"""Gated recurrent unit, with matrices a head, a gate and a norm."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from lme_core.layers.settings import ModelSettings
from lme_core.mixers.checks import common_heads
from lme_core.mixers.recurrent import Sequences
from lme_core.mixers.vector_recurrence import VectorRecurrence, VectorRecurrenceFields
from lme_kernels.ops.gru import GRU as GRU_OP
from lme_kernels.policy import KernelPolicy


@dataclass(frozen=True, slots=True, kw_only=True)
class GRUConfig(VectorRecurrenceFields):
    """Gated recurrent unit in every head (Cho et al. 2014, arXiv:1406.1078).

    f = sigmoid(h W_f + x_f), r = sigmoid(h W_r + x_r), z = tanh((r * h) W + x), and then
    h = f * h + (1 - f) * z.
    """

    sequence_mixer_type: Literal["gru"] = "gru"
    """Kind of mixer."""
    num_input_heads: int
    """Heads of the inputs x of the candidate z."""
    num_forget_input_heads: int
    """Heads of the inputs x_f of the forget gate f."""
    num_reset_input_heads: int
    """Heads of the inputs x_r of the reset gate r."""
    num_weight_heads: int
    """Heads of the matrices W. The largest number of heads is that of the recurrence; each head
    of fewer serves as many neighbours."""
    num_forget_weight_heads: int
    """Heads of the matrices W_f."""
    num_reset_weight_heads: int
    """Heads of the matrices W_r."""

    def __post_init__(self) -> None:
        self.check_fields()
        self.num_heads()

    def head_counts(self) -> Mapping[str, int]:
        """Numbers of heads by their settings' names."""
        return {
            "num_input_heads": self.num_input_heads,
            "num_forget_input_heads": self.num_forget_input_heads,
            "num_reset_input_heads": self.num_reset_input_heads,
            "num_weight_heads": self.num_weight_heads,
            "num_forget_weight_heads": self.num_forget_weight_heads,
            "num_reset_weight_heads": self.num_reset_weight_heads,
        }

    def num_heads(self) -> int:
        """Heads of the recurrence.

        Raises:
            ValueError: If a number of heads does not divide it.
        """
        return common_heads(self.head_counts())

    def input_heads(self) -> list[int]:
        """Heads of the inputs, in the order of the projection's rows."""
        return [self.num_input_heads, self.num_forget_input_heads, self.num_reset_input_heads]

    def forward_flops(self, settings: ModelSettings, sequence_length: int) -> float:
        """Floating-point operations of a forward pass, per token, of the products.

        Args:
            settings: The architecture.
            sequence_length: Tokens of a document; each costs the same.
        """
        return self.products(settings.hidden_size, self.input_heads(), 3, self.num_heads())

    def build(self, settings: ModelSettings, layer: int, kernels: KernelPolicy) -> "GRU":
        """Build the module of one layer.

        Args:
            settings: The architecture.
            layer: Index of the layer.
            kernels: Which implementations run.
        """
        return GRU(self, settings, kernels)


class GRU(VectorRecurrence):
    """Gated recurrent unit in every head."""

    def __init__(self, config: GRUConfig, settings: ModelSettings, kernels: KernelPolicy) -> None:
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
            input_heads=config.input_heads(),
            weight_heads=[
                config.num_weight_heads,
                config.num_forget_weight_heads,
                config.num_reset_weight_heads,
            ],
        )
        self.gru = kernels.bind(GRU_OP)

    def scan(
        self,
        inputs: Sequence[Tensor],
        weights: Sequence[Tensor],
        initial: Tensor | None,
        sequences: Sequences,
    ) -> tuple[Tensor, Tensor]:
        """Run the recurrence; see `VectorRecurrence`."""
        x, forget_input, reset_input = inputs
        weight, forget_weight, reset_weight = weights
        return self.gru(
            x,
            weight,
            forget_input,
            forget_weight,
            reset_input,
            reset_weight,
            initial_state=initial,
            cu_seqlens=sequences.cu_seqlens,
            max_seqlen=sequences.max_seqlen(),
            gradient_clipping=self.gradient_clipping,
        )
