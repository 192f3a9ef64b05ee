"""What every MLP is given."""

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor, nn

from lme_core.layers.auxiliary import Auxiliary
from lme_core.layers.context import SequenceContext


class MLP(nn.Module):
    """Base of the modules that transform each token by itself."""

    shard_plan: ClassVar[Mapping[str, str] | None] = None

    def forward(self, x: Tensor, context: SequenceContext) -> tuple[Tensor, Auxiliary]:
        """Transform each token.

        Args:
            x: Shape (B, S, H).
            context: Facts about the batch.

        Returns:
            Shape (B, S, H), to be added to the residual stream; and further losses and statistics.
        """
        raise NotImplementedError
