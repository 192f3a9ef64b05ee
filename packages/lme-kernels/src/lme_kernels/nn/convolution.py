"""The causal convolution of a channel with its past as a module."""

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from lme_kernels.op import Backend
from lme_kernels.ops.causal_conv1d import causal_conv1d


class CausalConv1d(nn.Module):
    """`causal_conv1d` with its taps and a bias."""

    bias: Parameter | None

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        bias: bool = True,
        *,
        activation: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        backend: Backend | str | None = None,
    ) -> None:
        """Make the module.

        Args:
            channels: Number of channels.
            kernel_size: Tokens that a result depends on.
            bias: Whether there is a bias.
            activation: "silu" or `None`.
            device: Where parameters are made.
            dtype: Their dtype.
            backend: Implementation to run; `None` takes the fastest one proven.
        """
        super().__init__()
        self.activation = activation
        self.backend = backend
        self.weight = Parameter(torch.empty(channels, kernel_size, device=device, dtype=dtype))
        shift = Parameter(torch.empty(channels, device=device, dtype=dtype)) if bias else None
        self.register_parameter("bias", shift)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw parameters as `torch.nn.Conv1d` draws those of groups of one channel."""
        bound = self.weight.shape[1] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor, *, cu_seqlens: Tensor | None = None) -> Tensor:
        """Convolve.

        Args:
            x: Inputs, shape (B, S, channels), or (T, channels) with `cu_seqlens`.
            cu_seqlens: Starts of packed sequences and T at the end; `None` if not packed.

        Returns:
            Shape and dtype of `x`.
        """
        return causal_conv1d(
            x,
            self.weight,
            self.bias,
            activation=self.activation,
            cu_seqlens=cu_seqlens,
            backend=self.backend,
        )
