"""Linear layers that know how they start."""

from collections.abc import Mapping

from torch import nn

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
