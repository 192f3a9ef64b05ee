"""What every MLP is given."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar

from torch import Tensor, nn

from lme_core.layers.auxiliary import Auxiliary
from lme_core.layers.context import SequenceContext


class MLP(nn.Module):
    """Base of the modules that transform each token by itself."""

    shard_plan: ClassVar[Mapping[str, str] | None] = None
    """As of a sequence mixer; losses of the second result must not depend on what is cut."""
    shard_units: Mapping[str, int] = MappingProxyType({})
    """What is never cut in pieces, by the name of the setting that counts it."""

    def forward(self, x: Tensor, context: SequenceContext) -> tuple[Tensor, Auxiliary]:
        """Transform each token.

        Args:
            x: Shape (B, S, H).
            context: Facts about the batch.

        Returns:
            Shape (B, S, H), to be added to the residual stream; and further losses and statistics.
        """
        raise NotImplementedError
