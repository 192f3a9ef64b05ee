"""What every sequence mixer is given, and what it keeps between tokens in generation."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from lme_core.layers.context import SequenceContext


class LayerCache(Protocol):
    """What a mixer keeps of the tokens it has seen."""

    def reorder(self, rows: Tensor) -> None:
        """Make row i what row `rows[i]` was.

        Args:
            rows: int64, shape (B,).
        """
        ...


class SequenceMixer(nn.Module):
    """Base of the modules that move information between tokens."""

    shard_plan: ClassVar[Mapping[str, str] | None] = None
    """Children and parameters that may be cut over devices, and by what: rows ("column") or columns
    ("row") of their weights, or rows where they divide and else not at all ("heads"). `{}`: whole on
    every device; `None`: it was not said."""
    shard_sections: Mapping[str, Sequence[int]] = MappingProxyType({})
    """Of those whose rows are sections, one after the other, each of which is cut: their lengths."""
    shard_units: Mapping[str, int] = MappingProxyType({})
    """What is never cut in pieces, by the name of the setting that counts it."""
    shard_or_whole: ClassVar[bool] = False
    """Whether devices whose number does not divide `shard_units` each have all; else it is refused."""
    part: tuple[int, int] = (0, 1)
    """Which part of the heads is here, and of how many; set where they are cut over devices."""

    def forward(self, x: Tensor, context: SequenceContext, cache: LayerCache | None) -> Tensor:
        """Mix along the sequence.

        Args:
            x: Shape (B, S, H).
            context: Facts about the batch.
            cache: Filled and read in generation.

        Returns:
            Shape (B, S, H), to be added to the residual stream.
        """
        raise NotImplementedError

    def new_cache(
        self, batch_size: int, max_length: int, *, device: torch.device, dtype: torch.dtype
    ) -> LayerCache:
        """Make an empty cache.

        Args:
            batch_size: Rows.
            max_length: Most tokens that a row will hold.
            device: Where it lives.
            dtype: Dtype of the activations.
        """
        raise NotImplementedError
