"""Long short-term memory, with matrices a head, a gate and a norm."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lme_core.layers.settings import ModelSettings
from lme_core.mixers.checks import common_heads
from lme_core.mixers.recurrent import Sequences
from lme_core.mixers.vector_recurrence import VectorRecurrence, VectorRecurrenceFields
from lme_kernels.ops.lstm import LSTM as LSTM_OP
from lme_kernels.policy import KernelPolicy


@dataclass(frozen=True, slots=True, kw_only=True)
class LSTMConfig(VectorRecurrenceFields):
    """Long short-term memory in every head (Hochreiter and Schmidhuber 1997).

    g = tanh(h W + x), each of the gates f, i and o = sigmoid(h W' + x') with its own W' and x', and
    then c = f * c + i * g and h = o * tanh(c).
    """

    sequence_mixer_type: Literal["lstm"] = "lstm"
    """Kind of mixer."""
    num_input_heads: int
    """Heads of the inputs of the candidate and of each gate."""
    num_weight_heads: int
    """Heads of the matrices of the candidate and of each gate. The larger of both numbers is that
    of the recurrence; each head of the fewer serves as many neighbours."""

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
        inputs = [self.num_input_heads] * 4
        return self.products(settings.hidden_size, inputs, 4, self.num_heads())

    def build(self, settings: ModelSettings, layer: int, kernels: KernelPolicy) -> "LSTM":
        """Build the module of one layer.

        Args:
            settings: The architecture.
            layer: Index of the layer.
            kernels: Which implementations run.
        """
        return LSTM(self, settings, kernels)


class LSTM(VectorRecurrence):
    """Long short-term memory in every head; rows go candidate, forget, input, output."""

    state_heads_dim: ClassVar[int] = 1

    def __init__(self, config: LSTMConfig, settings: ModelSettings, kernels: KernelPolicy) -> None:
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
            input_heads=[config.num_input_heads] * 4,
            weight_heads=[config.num_weight_heads] * 4,
        )
        self.lstm = kernels.bind(LSTM_OP)
        # The output h and the cell c of each head.
        self.state_shape = (2, self.num_heads, self.head_size)

    def scan(
        self,
        inputs: Sequence[Tensor],
        weights: Sequence[Tensor],
        initial: Tensor | None,
        sequences: Sequences,
    ) -> tuple[Tensor, Tensor]:
        """Run the recurrence; see `VectorRecurrence`."""
        state, cell = (None, None) if initial is None else initial.unbind(1)
        x, forget_input, input_input, output_input = inputs
        weight, forget_weight, input_weight, output_weight = weights
        y, state, cell = self.lstm(
            x,
            weight,
            forget_input,
            forget_weight,
            input_input,
            input_weight,
            output_input,
            output_weight,
            initial_state=state,
            initial_cell=cell,
            cu_seqlens=sequences.cu_seqlens,
            max_seqlen=sequences.max_seqlen(),
            gradient_clipping=self.gradient_clipping,
        )
        return y, torch.stack((state, cell), dim=1)
