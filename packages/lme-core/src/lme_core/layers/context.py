"""Facts about a batch that all blocks share."""

from dataclasses import dataclass, replace

from torch import Tensor

from lme_core.layers import random


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceContext:
    """Facts about a batch that all blocks share, computed once a forward."""

    rotary: tuple[Tensor, Tensor] | None = None
    """Cosines and sines, each (S, R) or (B, S, R), in at least float32."""
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
        """Return the same with a dropout key of the layer's own, so that masks differ.

        Args:
            layer: Index in the whole model.
        """
        if self.dropout_key is None:
            return self
        return replace(self, dropout_key=random.mix(self.dropout_key, layer + 1))
