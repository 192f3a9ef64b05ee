"""What recurrences have in common whose state is a vector a head: rnn, gru, lstm."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from lme_core.layers.activation import Activation
from lme_core.layers.context import SequenceContext
from lme_core.layers.initialization import Normal, ParameterSpec, linear_std
from lme_core.layers.linear import Linear
from lme_core.layers.settings import ModelSettings, Normalization
from lme_core.mixers.base import LayerCache
from lme_core.mixers.checks import check_positive, head_units
from lme_core.mixers.gated_norm import GatedNorm
from lme_core.mixers.recurrent import RecurrentMixer, RecurrentMixerConfig, Sequences
from lme_core.mixers.short_convolution import (
    ShortConvolution,
    check_kernel_size,
    check_plain_activation,
    plain_activation,
)
from lme_kernels.policy import KernelPolicy


@dataclass(frozen=True, slots=True, kw_only=True)
class VectorRecurrenceFields(RecurrentMixerConfig):
    """Settings that `rnn`, `gru` and `lstm` share."""

    state_head_dim: int
    """Channels of a head's state."""
    add_bias: bool = False
    """Whether the input projection and the convolution have biases."""
    normalization_function: Normalization | None = None
    """Norm of the gated output; null for none."""
    gradient_clipping: float | None = None
    """Bound on each element of a state's gradient, backward in time; null for none."""
    kernel_size: int | None = None
    """Tokens that a convolution of the inputs sees, at least 2; null for no convolution."""
    activation_function: str | None = None
    """Function of the inputs, after the convolution if there is one; null for none. Inputs of
    gates are neither convolved nor transformed."""

    def check_fields(self) -> None:
        """Check the settings that are here.

        Raises:
            ValueError: If one is out of range.
        """
        check_positive(
            {"state_head_dim": self.state_head_dim, "gradient_clipping": self.gradient_clipping}
        )
        check_kernel_size(self.kernel_size)
        check_plain_activation(self.activation_function)

    def head_counts(self) -> Mapping[str, int]:
        """Numbers of heads by their settings' names."""
        raise NotImplementedError

    def products(
        self, hidden_size: int, input_heads: Sequence[int], weights: int, num_heads: int
    ) -> float:
        """Floating-point operations of a forward pass, per token.

        Args:
            hidden_size: Width of the model.
            input_heads: Heads of each projected input, the convolved one first.
            weights: Matrices that the state of a head is multiplied with.
            num_heads: Heads of the recurrence.
        """
        D = self.state_head_dim
        projections = 2 * hidden_size * D * (sum(input_heads) + 2 * num_heads)
        convolution = 2 * input_heads[0] * D * (self.kernel_size or 0)
        return float(projections + convolution + 2 * weights * num_heads * D * D)


class VectorRecurrence(RecurrentMixer):
    """Projection, convolution, recurrence, gated norm, projection."""

    shard_plan: ClassVar[Mapping[str, str] | None] = {
        "input": "column",
        "convolution": "column",
        "state_weight": "heads",
        "norm": "column",
        "output": "row",
    }

    def __init__(
        self,
        config: VectorRecurrenceFields,
        settings: ModelSettings,
        kernels: KernelPolicy,
        *,
        input_heads: Sequence[int],
        weight_heads: Sequence[int],
    ) -> None:
        """Allocate without initialising.

        Args:
            config: What this layer is.
            settings: The architecture.
            kernels: Which implementations run.
            input_heads: Heads of each projected input, the candidate's first.
            weight_heads: Heads of each of the recurrence's matrices.
        """
        super().__init__(kernels)
        H, D = settings.hidden_size, config.state_head_dim
        self.num_heads = max(*input_heads, *weight_heads)
        width = self.num_heads * D
        self.gradient_clipping = config.gradient_clipping
        self.head_size = D
        # Rows of the projection: inputs, one after the other, then the gate of the output.
        self.sizes = [*(heads * D for heads in input_heads), width]
        self.input_heads = [*input_heads]
        self.weight_heads = [*weight_heads]
        self.shard_sections = {"input": self.sizes, "state_weight": self.weight_heads}
        counts = config.head_counts()
        self.shard_units = head_units(counts, dict.fromkeys(counts, D))
        self.input = Linear(
            H, sum(self.sizes), bias=config.add_bias, std=linear_std(settings, H), mup=True
        )
        self.activation: Activation | None = None
        if config.kernel_size is None:
            self.activation = plain_activation(config.activation_function, kernels)
        else:
            self.convolution = ShortConvolution(
                self.sizes[0],
                config.kernel_size,
                bias=config.add_bias,
                activation=config.activation_function,
                settings=settings,
                kernels=kernels,
            )
        self.state_weight = nn.Parameter(torch.empty(sum(weight_heads), D, D))
        self.state_std = linear_std(settings, D)
        self.norm = GatedNorm(
            config.normalization_function, width, settings=settings, kernels=kernels
        )
        self.output = Linear(
            width, H, bias=False, std=linear_std(settings, width, output=True), mup=True
        )
        self.state_shape = (self.num_heads, D)

    def parameter_specs(self) -> Mapping[str, ParameterSpec]:
        """Spec of `state_weight`, the matrices that states are multiplied with."""
        return {"state_weight": ParameterSpec(Normal(self.state_std), weight_decay=False, mup=True)}

    def scan(
        self,
        inputs: Sequence[Tensor],
        weights: Sequence[Tensor],
        initial: Tensor | None,
        sequences: Sequences,
    ) -> tuple[Tensor, Tensor]:
        """Run the recurrence.

        Args:
            inputs: One for each of `input_heads`, shape (tokens..., heads, D).
            weights: One for each of `weight_heads`, shape (heads, D, D).
            initial: States before the sequences, shape (sequences, *state_shape).
            sequences: How tokens are laid out.

        Returns:
            Outputs, shape (tokens..., N, D), and the states after the sequences.
        """
        raise NotImplementedError

    def forward(self, x: Tensor, context: SequenceContext, cache: LayerCache | None) -> Tensor:
        """Mix along the sequence; see `SequenceMixer`."""
        sequences = self.sequences(x, context, cache)
        tokens = self.pack(self.input(x), sequences)
        candidate, *others, gate = tokens.split(self.here(self.sizes), dim=-1)
        candidate = self.convolve(candidate, sequences, cache)
        if self.activation is not None:
            candidate = self.activation(candidate)
        inputs = [
            self.heads_here(each, heads, serve=self.num_heads)
            for each, heads in zip((candidate, *others), self.input_heads, strict=True)
        ]
        weights = self._weights_here()

        # Quoted: some versions of torch cannot trace the making of a union.
        def run(initial: "Tensor | None") -> tuple[Tensor, Tensor]:
            return self.scan(inputs, weights, initial, sequences)

        y = self.recur(run, sequences, cache)
        return self.output(self.unpack(self.norm(y.flatten(-2), gate), sequences))

    def _weights_here(self) -> Sequence[Tensor]:
        """Matrices of the heads that are here."""
        if len(self.state_weight) < sum(self.weight_heads):
            return self.state_weight.split(self.here(self.weight_heads))
        return [
            self.select_heads(each, serve=self.num_heads, dim=0)
            for each in self.state_weight.split(self.weight_heads)
        ]
