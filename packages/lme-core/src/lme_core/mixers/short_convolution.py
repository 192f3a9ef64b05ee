"""The depthwise causal convolution that recurrent mixers put before their state."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lme_core.layers.activation import Activation, base_of, is_glu
from lme_core.layers.initialization import Constant, Normal, ParameterSpec, linear_std
from lme_core.layers.settings import ModelSettings
from lme_kernels.ops.causal_conv1d import CAUSAL_CONV1D
from lme_kernels.policy import KernelPolicy


class Convolution(nn.Module):
    """A causal convolution along sequences, as recurrent mixers use it."""

    channels: int
    """Number of input channels."""
    width: int
    """Inputs that make an output."""

    def forward(self, x: Tensor, initial: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
        """Convolve.

        Args:
            x: Shape (B, S, C), or (T, C) with `cu_seqlens`.
            initial: Inputs before each sequence, shape (sequences, C, width - 1); `None` for zeros.
            cu_seqlens: Bounds of packed sequences.

        Returns:
            The tokens of `x`, with the channels that the convolution gives.
        """
        raise NotImplementedError

    def step(
        self, x: Tensor, initial: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Convolve, and give the last inputs too; see `forward`.

        Returns:
            As `forward`; and what to pass as `initial` for the tokens that follow.
        """
        raise NotImplementedError


class ShortConvolution(Convolution):
    """Each channel's own mixture of its last inputs, then an activation function."""

    def __init__(
        self,
        channels: int,
        width: int,
        *,
        bias: bool,
        activation: str | None,
        settings: ModelSettings,
        kernels: KernelPolicy,
    ) -> None:
        """Allocate without initialising.

        Args:
            channels: Number of channels.
            width: Inputs that make an output, at least 2.
            bias: Whether there is one.
            activation: Name of a function without a gate; `None` for none.
            settings: The architecture.
            kernels: Which implementations run.
        """
        super().__init__()
        self.channels = channels
        self.width = width
        self.std = linear_std(settings, width)
        self.weight = nn.Parameter(torch.empty(channels, 1, width))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None
        self.silu = activation is not None and base_of(activation) == "silu"
        self.activation = plain_activation(None if self.silu else activation, kernels)
        self.convolve = kernels.bind(CAUSAL_CONV1D)

    def parameter_specs(self) -> Mapping[str, ParameterSpec]:
        """Specs of `weight` and, where there is one, `bias`."""
        specs = {"weight": ParameterSpec(Normal(self.std))}
        if self.bias is not None:
            specs["bias"] = ParameterSpec(Constant(0.0), weight_decay=False)
        return specs

    def forward(self, x: Tensor, initial: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
        """Convolve; see `Convolution`."""
        y = self.convolve(
            x,
            self.weight.squeeze(1),
            self.bias,
            activation="silu" if self.silu else None,
            initial_state=initial,
            cu_seqlens=cu_seqlens,
        )
        return y if self.activation is None else self.activation(y)

    def step(
        self, x: Tensor, initial: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Convolve, and give the last inputs too; see `Convolution`."""
        y, last = self.convolve(
            x,
            self.weight.squeeze(1),
            self.bias,
            activation="silu" if self.silu else None,
            initial_state=initial,
            return_final_state=True,
            cu_seqlens=cu_seqlens,
        )
        return (y if self.activation is None else self.activation(y)), last


def plain_activation(name: str | None, kernels: KernelPolicy) -> Activation | None:
    """Build an activation function; `None` for none."""
    return None if name is None else Activation(name, kernels)


def check_plain_activation(name: str | None) -> None:
    """Refuse an activation that is unknown or has a gate, which would halve the channels.

    Args:
        name: Name of the function; `None` for none.

    Raises:
        ValueError: If it is.
    """
    if name is None:
        return
    base = base_of(name)
    if is_glu(name):
        raise ValueError(
            f"`activation_function` must have no gate here, got `{name}`: take `{base}`"
        )


def check_kernel_size(size: int | None) -> None:
    """Refuse a convolution of fewer than two taps.

    Raises:
        ValueError: If it has.
    """
    if size is not None and size < 2:
        raise ValueError(f"`kernel_size` must be at least 2, or null for none, got {size}")
