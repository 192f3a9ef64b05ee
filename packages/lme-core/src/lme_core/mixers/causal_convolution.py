"""A causal convolution over the sequence that also mixes channels."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lme_core.layers.activation import Activation, check_activation, is_glu
from lme_core.layers.context import SequenceContext
from lme_core.layers.initialization import Constant, Normal, ParameterSpec, linear_std
from lme_core.layers.linear import Linear
from lme_core.layers.settings import ModelSettings
from lme_core.mixers.base import LayerCache
from lme_core.mixers.checks import check_positive
from lme_core.mixers.recurrent import RecurrentMixer, RecurrentMixerConfig
from lme_core.mixers.short_convolution import Convolution
from lme_kernels.ops.causal_conv1d.reference import last_inputs
from lme_kernels.packing import position_ids, sequence_ids
from lme_kernels.policy import KernelPolicy


@dataclass(frozen=True, slots=True, kw_only=True)
class CausalConvolutionConfig(RecurrentMixerConfig):
    """Projection, causal convolution in groups of channels, activation, projection."""

    sequence_mixer_type: Literal["causal_convolution"] = "causal_convolution"
    """Kind of mixer."""
    activation_function: str = "silu"
    """Function after the convolution; one that ends in `glu` is gated and halves the channels,
    of which the even ones are the gate."""
    in_channels: int
    """Channels before the convolution."""
    out_channels: int
    """Channels after it."""
    kernel_size: int
    """Tokens that it sees, at least 2."""
    num_groups: int
    """Equal groups of channels that it keeps apart: 1 mixes all."""
    add_bias: bool = False
    """Whether projections and convolution have biases."""

    def __post_init__(self) -> None:
        check_activation(self.activation_function)
        check_positive(
            {
                "in_channels": self.in_channels,
                "out_channels": self.out_channels,
                "num_groups": self.num_groups,
            }
        )
        if self.kernel_size < 2:
            raise ValueError(f"`kernel_size` must be at least 2, got {self.kernel_size}")
        for name, channels in (
            ("in_channels", self.in_channels),
            ("out_channels", self.out_channels),
        ):
            if channels % self.num_groups:
                raise ValueError(
                    f"`{name}` must be a multiple of `num_groups`, got {channels} and "
                    f"{self.num_groups}"
                )
        if is_glu(self.activation_function) and self.out_channels % 2:
            raise ValueError(
                f"`out_channels` must be even, since `{self.activation_function}` halves it, got "
                f"{self.out_channels}"
            )

    def width(self) -> int:
        """Channels after the activation."""
        return self.out_channels // (2 if is_glu(self.activation_function) else 1)

    def forward_flops(self, settings: ModelSettings, sequence_length: int) -> float:
        """Floating-point operations of a forward pass, per token, of the products.

        Args:
            settings: The architecture.
            sequence_length: Tokens of a document; each costs the same.
        """
        projections = 2 * settings.hidden_size * (self.in_channels + self.width())
        taps = self.out_channels * self.in_channels // self.num_groups * self.kernel_size
        return float(projections + 2 * taps)

    def build(
        self, settings: ModelSettings, layer: int, kernels: KernelPolicy
    ) -> "CausalConvolution":
        """Build the module of one layer.

        Args:
            settings: The architecture.
            layer: Index of the layer.
            kernels: Which implementations run.
        """
        return CausalConvolution(self, settings, kernels)


class CausalConvolution(RecurrentMixer):
    """Projection, causal convolution, activation, projection."""

    shard_plan: ClassVar[Mapping[str, str] | None] = {
        "input": "column",
        "convolution": "column",
        "output": "row",
    }

    def __init__(
        self, config: CausalConvolutionConfig, settings: ModelSettings, kernels: KernelPolicy
    ) -> None:
        """Allocate without initialising.

        Args:
            config: What this layer is.
            settings: The architecture.
            kernels: Which implementations run.
        """
        super().__init__(kernels)
        H, width, bias = settings.hidden_size, config.width(), config.add_bias
        # One group makes all channels of all: its inputs are gathered, its outputs are cut.
        self.is_mixing_all = config.num_groups == 1
        outputs = "out_channels / 2" if is_glu(config.activation_function) else "out_channels"
        self.shard_units = {outputs: width}
        if self.is_mixing_all:
            self.shard_units["in_channels"] = config.in_channels
        else:
            self.shard_units["num_groups"] = config.num_groups
        self.input = Linear(H, config.in_channels, bias=bias, std=linear_std(settings, H), mup=True)
        self.convolution = GroupedConvolution(config, settings)
        self.activation = Activation(config.activation_function, kernels)
        self.output = Linear(
            width, H, bias=bias, std=linear_std(settings, width, output=True), mup=True
        )

    def forward(self, x: Tensor, context: SequenceContext, cache: LayerCache | None) -> Tensor:
        """Mix along the sequence; see `SequenceMixer`."""
        sequences = self.sequences(x, context, cache)
        inputs = self.input(x)
        if self.is_mixing_all:
            inputs = self.gather_channels(inputs)
        y = self.convolve(self.pack(inputs, sequences), sequences, cache)
        return self.output(self.unpack(self.activation(y), sequences))


class GroupedConvolution(Convolution):
    """Causal convolution that mixes the channels of a group."""

    def __init__(self, config: CausalConvolutionConfig, settings: ModelSettings) -> None:
        """Allocate without initialising.

        Args:
            config: What the layer is.
            settings: The architecture.
        """
        super().__init__()
        self.channels = config.in_channels
        self.width = config.kernel_size
        inputs = config.in_channels // config.num_groups
        self.std = linear_std(settings, inputs * config.kernel_size)
        self.weight = nn.Parameter(torch.empty(config.out_channels, inputs, config.kernel_size))
        self.bias = nn.Parameter(torch.empty(config.out_channels)) if config.add_bias else None

    def parameter_specs(self) -> Mapping[str, ParameterSpec]:
        """Specs of `weight` and, where there is one, `bias`."""
        specs = {"weight": ParameterSpec(Normal(self.std))}
        if self.bias is not None:
            specs["bias"] = ParameterSpec(Constant(0.0), weight_decay=False)
        return specs

    def forward(self, x: Tensor, initial: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
        """Convolve; see `Convolution`."""
        if cu_seqlens is not None:
            windows = self._windows(x, initial, cu_seqlens)
            return self._apply_weight(windows).squeeze(-1)
        if initial is None:
            padded = F.pad(x.mT, (self.width - 1, 0))
        else:
            padded = torch.cat((initial.to(x.dtype), x.mT), dim=-1)
        return self._apply_weight(padded).mT

    def step(
        self, x: Tensor, initial: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Convolve, and give the last inputs too; see `Convolution`."""
        last = last_inputs(x, initial, cu_seqlens, self.width)
        return self(x, initial, cu_seqlens), last

    def _apply_weight(self, x: Tensor) -> Tensor:
        # As many groups as are here.
        groups = x.shape[1] // self.weight.shape[1]
        return F.conv1d(x, self.weight, self.bias, groups=groups)

    def _windows(self, x: Tensor, initial: Tensor | None, cu_seqlens: Tensor) -> Tensor:
        """List what each packed token sees of its own sequence, shape (T, C, width)."""
        position = position_ids(cu_seqlens, len(x))[:, None]
        owner = sequence_ids(cu_seqlens, len(x))
        columns = []
        for distance in range(self.width - 1, 0, -1):
            before = x.new_zeros(())
            if initial is not None:
                column = (self.width - 1 - distance + position[:, 0]).clamp(max=self.width - 2)
                before = initial.to(x.dtype)[owner, :, column]
            columns.append(torch.where(position >= distance, x.roll(distance, 0), before))
        return torch.stack((*columns, x), dim=-1)
