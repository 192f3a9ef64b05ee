"""Linear layers that know how they start."""

from collections.abc import Mapping
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from lme_core.layers.initialization import Constant, Normal, ParameterSpec


class Linear(nn.Linear):
    """Linear layer with normal weights and zero biases."""

    def __init__(
        self, in_features: int, out_features: int, *, bias: bool, std: float, mup: bool
    ) -> None:
        """Allocate without initialising.

        Args:
            in_features: Inputs.
            out_features: Outputs.
            bias: Whether it has one.
            std: Standard deviation of the initial weights.
            mup: Whether its weights' learning rate follows the width.
        """
        self.std = std
        self.mup = mup
        super().__init__(in_features, out_features, bias=bias)

    def reset_parameters(self) -> None:
        """Do nothing: values come from `initial_value`, so no generator is consumed."""

    def parameter_specs(self) -> Mapping[str, ParameterSpec]:
        """Specs of `weight` and, where there is one, `bias`."""
        specs = {"weight": ParameterSpec(Normal(self.std), mup=self.mup)}
        if self.bias is not None:
            specs["bias"] = ParameterSpec(Constant(0.0), weight_decay=False)
        return specs


class GatedLinear(Linear):
    """First layer of a gated unit: even rows of its weight make the gate, odd ones its partner.

    Files and parallel layouts keep that order. On a CPU, where strided channels are slow to read,
    rows are sorted before the product if there are tokens enough to pay for it.
    """

    def layout(self, x: Tensor) -> Literal["interleaved", "concatenated"]:
        """Say in which order the channels of `self(x)` come.

        Args:
            x: Shape (..., in_features).
        """
        # A weight cut over devices is another type, and its rows stay where they are.
        plain = type(self.weight) is nn.Parameter and x.device.type == "cpu"
        return "concatenated" if plain and x.shape[:-1].numel() >= 128 else "interleaved"

    # The name is the parent's.
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """Multiply.

        Args:
            input: Shape (..., in_features).

        Returns:
            Shape (..., out_features), gate and partner in the order that `layout` says.
        """
        if self.layout(input) == "interleaved":
            return F.linear(input, self.weight, self.bias)
        weight = self.weight.unflatten(0, (-1, 2)).transpose(0, 1).flatten(0, 1)
        bias = None if self.bias is None else self.bias.view(-1, 2).t().flatten()
        return F.linear(input, weight, bias)


class Embedding(nn.Embedding):
    """Table of vectors with normal entries."""

    def __init__(self, num_embeddings: int, embedding_dim: int, *, std: float) -> None:
        """Allocate without initialising.

        Args:
            num_embeddings: Rows.
            embedding_dim: Width.
            std: Standard deviation of the initial entries.
        """
        self.std = std
        super().__init__(num_embeddings, embedding_dim)

    def reset_parameters(self) -> None:
        """Do nothing: values come from `initial_value`, so no generator is consumed."""

    def parameter_specs(self) -> Mapping[str, ParameterSpec]:
        """Spec of `weight`."""
        return {"weight": ParameterSpec(Normal(self.std))}
