"""Mamba 2: a state space model whose decay is one number a head."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from lme_core.layers.context import SequenceContext
from lme_core.layers.initialization import Constant, ParameterSpec, linear_std
from lme_core.layers.linear import Linear
from lme_core.layers.settings import ModelSettings, Normalization
from lme_core.mixers.base import LayerCache
from lme_core.mixers.checks import check_positive
from lme_core.mixers.decay_gate import DecayGate, DecayGateFields
from lme_core.mixers.gated_norm import GatedNorm
from lme_core.mixers.recurrent import RecurrentMixer, RecurrentMixerConfig
from lme_core.mixers.short_convolution import ShortConvolution, check_plain_activation
from lme_kernels.ops.mamba2_ssm import MAMBA2_SSM
from lme_kernels.policy import KernelPolicy


@dataclass(frozen=True, slots=True, kw_only=True)
class Mamba2Config(RecurrentMixerConfig, DecayGateFields):
    """Mamba 2 (Dao and Gu 2024, arXiv:2405.21060)."""

    sequence_mixer_type: Literal["mamba2"] = "mamba2"
    """Kind of mixer."""
    state_size: int = 128
    """Channels of the state, for each channel of a head."""
    intermediate_size: int | None = None
    """Channels of all heads; absent: 2 times `hidden_size`."""
    num_heads: int = 128
    """Heads."""
    conv_kernel_size: int = 4
    """Tokens that the convolution before the state sees, at least 2."""
    time_step_limit: tuple[float, float] = (0.0, float("inf"))
    """Bounds of the steps."""
    add_bias: bool = False
    """Whether the projections have biases."""
    use_conv_bias: bool = True
    """Whether the convolution has a bias."""
    activation_function: str = "silu"
    """Function after the convolution."""
    num_groups: int = 8
    """Groups of heads that share what writes to the state and what reads it."""
    chunk_size: int = 256
    """Tokens that are multiplied at once; the result does not depend on it."""
    normalization_function: Normalization | None = "rmsnorm"
    """Norm of the gated output; null for none."""
    normalize_by_group: bool = False
    """Whether each group of heads is normalised by itself, as `Mamba2ForCausalLM` does."""

    def __post_init__(self) -> None:
        check_positive(
            {
                "state_size": self.state_size,
                "intermediate_size": self.intermediate_size,
                "num_heads": self.num_heads,
                "num_groups": self.num_groups,
                "chunk_size": self.chunk_size,
            }
        )
        if self.conv_kernel_size < 2:
            raise ValueError(f"`conv_kernel_size` must be at least 2, got {self.conv_kernel_size}")
        if self.num_heads % self.num_groups:
            raise ValueError(
                f"`num_heads` must be a multiple of `num_groups`, got {self.num_heads} and "
                f"{self.num_groups}"
            )
        low, high = self.time_step_limit
        if not 0 <= low <= high:
            raise ValueError(
                f"`time_step_limit` must be two numbers that do not fall, the first at least 0, "
                f"got {list(self.time_step_limit)}"
            )
        check_plain_activation(self.activation_function)
        self.check_decay()

    def check(self, settings: ModelSettings) -> None:
        """Check what depends on the architecture.

        Raises:
            ValueError: If the heads do not divide the width.
        """
        width = self.width(settings.hidden_size)
        if width % self.num_heads:
            raise ValueError(
                f"`num_heads` ({self.num_heads}) must divide `intermediate_size` ({width})"
            )

    def width(self, hidden_size: int) -> int:
        """Channels of all heads in a model of that width."""
        return 2 * hidden_size if self.intermediate_size is None else self.intermediate_size

    def forward_flops(self, settings: ModelSettings, sequence_length: int) -> float:
        """Floating-point operations of a forward pass, per token.

        Counted are the projections, the convolution, and what writes to the state and reads it;
        not what a computation by chunks adds.

        Args:
            settings: The architecture.
            sequence_length: Tokens of a document; each costs the same.
        """
        width = self.width(settings.hidden_size)
        convolved = width + 2 * self.num_groups * self.state_size
        projections = 2 * settings.hidden_size * (2 * width + convolved + self.num_heads)
        return float(
            projections + 2 * convolved * self.conv_kernel_size + 4 * width * self.state_size
        )

    def build(self, settings: ModelSettings, layer: int, kernels: KernelPolicy) -> "Mamba2":
        """Build the module of one layer.

        Args:
            settings: The architecture.
            layer: Index of the layer.
            kernels: Which implementations run.
        """
        return Mamba2(self, settings, kernels)


class Mamba2(RecurrentMixer):
    """Projection, convolution, state space model, gated norm, projection."""

    shard_plan: ClassVar[Mapping[str, str] | None] = {
        "input": "column",
        "convolution": "column",
        "decay_gate": "column",
        "D": "column",
        "norm": "column",
        "output": "row",
    }

    def __init__(
        self, config: Mamba2Config, settings: ModelSettings, kernels: KernelPolicy
    ) -> None:
        """Allocate without initialising.

        Args:
            config: What this layer is.
            settings: The architecture.
            kernels: Which implementations run.
        """
        super().__init__(kernels)
        H, width, N = settings.hidden_size, config.width(settings.hidden_size), config.num_heads
        groups = config.num_groups * config.state_size
        self.config = config
        # Rows of the projection: gate, then what is convolved (inputs, writers, readers), steps.
        self.sizes = [width, width + 2 * groups, N]
        self.convolved_sizes = [width, groups, groups]
        self.shard_sections = {
            "input": [width, *self.convolved_sizes, N],
            "convolution": self.convolved_sizes,
        }
        self.shard_units = {"num_heads": N, "num_groups * state_size": groups}
        if config.normalize_by_group and config.num_groups > 1:
            self.shard_units["num_groups"] = config.num_groups
        self.input = Linear(
            H, sum(self.sizes), bias=config.add_bias, std=linear_std(settings, H), mup=True
        )
        self.convolution = ShortConvolution(
            self.sizes[1],
            config.conv_kernel_size,
            bias=config.use_conv_bias,
            activation=config.activation_function,
            settings=settings,
            kernels=kernels,
        )
        self.decay_gate = DecayGate(N, config, mup=True)
        self.D = nn.Parameter(torch.empty(N))
        self.norm = GatedNorm(
            config.normalization_function,
            width,
            groups=config.num_groups if config.normalize_by_group else 1,
            settings=settings,
            kernels=kernels,
        )
        self.output = Linear(
            width,
            H,
            bias=config.add_bias,
            std=linear_std(settings, width, output=True),
            mup=True,
        )
        self.ssm = kernels.bind(MAMBA2_SSM)
        self.state_shape = (N, width // N, config.state_size)

    def parameter_specs(self) -> Mapping[str, ParameterSpec]:
        """Spec of `D`, the factor of each head's input."""
        return {"D": ParameterSpec(Constant(1.0), weight_decay=False, mup=True)}

    def forward(self, x: Tensor, context: SequenceContext, cache: LayerCache | None) -> Tensor:
        """Mix along the sequence; see `SequenceMixer`."""
        sequences = self.sequences(x, context, cache)
        tokens = self.pack(self.input(x), sequences)
        gate, convolved, dt = tokens.split(self.here(self.sizes), dim=-1)
        convolved = self.convolve(convolved, sequences, cache)
        inputs, writers, readers = convolved.split(self.here(self.convolved_sizes), dim=-1)
        N, groups = self.config.num_heads, self.config.num_groups
        inputs = self.heads_here(inputs, N, serve=N)
        writers, readers = (self.heads_here(each, groups, serve=N) for each in (writers, readers))
        step = self.decay_gate.step(dt).clamp(*self.config.time_step_limit)
        rate = self.decay_gate.rate()

        # Quoted: some versions of torch cannot trace the making of a union.
        def run(initial: "Tensor | None") -> tuple[Tensor, Tensor]:
            return self.ssm(
                inputs,
                step,
                rate,
                writers,
                readers,
                D=self.D,
                initial_state=initial,
                return_final_state=True,
                cu_seqlens=sequences.cu_seqlens,
                chunk_size=sequences.chunk_size(self.config.chunk_size),
            )

        y = self.recur(run, sequences, cache, step * rate)
        return self.output(self.unpack(self.norm(y.flatten(-2), gate), sequences))
