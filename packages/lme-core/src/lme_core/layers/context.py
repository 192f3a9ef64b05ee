"""Facts about a batch that all blocks share."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from torch import Tensor

from lme_core.layers import random


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceContext:
    """Facts about a batch that all blocks share, computed once a forward."""

    rotary: tuple[Tensor, Tensor] | None = None
    """Cosines and sines, each (S, R) or (B, S, R), in at least float32."""
    rotary_of_layers: Mapping[int, tuple[Tensor, Tensor]] = field(
        default_factory=lambda: MappingProxyType({})
    )
    """The same for layers that have their own, by index; empty in a block."""
    cu_seqlens: Tensor | None = None
    """int32, bounds of the packed documents over the flattened B*S tokens."""
    mask: Tensor | None = None
    """Additive, (B, 1, S, T), where left padding hides keys; beside causality."""
    valid: Tensor | None = None
    """bool, (B, S); `None` where all tokens are."""
    dropout_key: Tensor | None = None
    """0-d int64, a hash of seed and step (and layer, in a block); `None` outside training."""
    token_index: Tensor | None = None
    """int64, (B, S): each token's position in the global batch."""

    def at_layer(self, layer: int) -> "SequenceContext":
        """Return what one layer reads: its rotation, and a dropout key of its own.

        Args:
            layer: Index in the whole model.
        """
        if self.rotary_of_layers:
            rotary = self.rotary_of_layers.get(layer, self.rotary)
            return replace(self, rotary=rotary, rotary_of_layers={}).at_layer(layer)
        if self.dropout_key is None:
            return self
        # A key of the layer's own, so that masks differ.
        return replace(self, dropout_key=random.mix(self.dropout_key, layer + 1))
