"""What a decoder keeps of the tokens it has seen, in generation."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lme_core.mixers.base import LayerCache


@dataclass(slots=True)
class DecoderCache:
    """Caches of the layers, and which of the tokens seen are padding."""

    layers: Mapping[str, LayerCache]
    """By layer index."""
    length: int = 0
    """Tokens seen, padding included."""
    valid: Tensor | None = None
    """bool, (B, length): which are no padding; `None` for all."""
    positions: Tensor | None = None
    """int64, (B, 1): position of each row's next token; `None` where it is `length`."""

    def place(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Count the coming tokens as seen and give them positions that continue the others'.

        Args:
            batch: `input_ids` (B, S), and `valid` (B, S) where rows are padded on the left.

        Returns:
            The batch with `position_ids`.
        """
        ids = batch["input_ids"]
        valid = batch.get("valid")
        if valid is None:
            steps = torch.arange(1, ids.shape[1] + 1, device=ids.device).expand(ids.shape)
        else:
            steps = valid.long().cumsum(-1)
        start = self.length if self.positions is None else self.positions
        if valid is not None or self.valid is not None:
            seen = ids.new_ones(ids.shape[0], self.length, dtype=torch.bool)
            coming = ids.new_ones(ids.shape, dtype=torch.bool)
            self.valid = torch.cat(
                (
                    seen if self.valid is None else self.valid,
                    coming if valid is None else valid,
                ),
                dim=1,
            )
            self.positions = start + steps[:, -1:]
        self.length += ids.shape[1]
        return {**batch, "position_ids": (start + steps - 1).clamp_min(0)}

    def mask(self, dtype: torch.dtype) -> Tensor | None:
        """Hide padding from attention.

        Args:
            dtype: Dtype of the result.

        Returns:
            Additive, shape (B, 1, S, T) with one row for all S queries; `None` without padding.
        """
        if self.valid is None:
            return None
        hidden = torch.zeros(self.valid.shape, dtype=dtype, device=self.valid.device)
        # A finite number: a query on padding sees hidden keys only, and must not become NaN.
        return hidden.masked_fill(~self.valid, torch.finfo(dtype).min)[:, None, None, :]

    def reorder(self, rows: Tensor) -> None:
        """Make row i what row `rows[i]` was, in every layer.

        Args:
            rows: int64, shape (B,).
        """
        for layer in self.layers.values():
            layer.reorder(rows)
        if self.valid is not None:
            self.valid = self.valid[rows]
        if self.positions is not None:
            self.positions = self.positions[rows]
