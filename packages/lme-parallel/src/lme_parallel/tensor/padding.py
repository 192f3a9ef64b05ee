"""Rows made long enough to be cut into equal parts."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

_IGNORED = -100


@dataclass(frozen=True, slots=True)
class PadBatch:
    """Pads the rows of a batch on the right to a multiple of a length."""

    multiple: int
    """Tokens."""

    def __call__(self, batch: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Pad.

        Args:
            batch: With `input_ids` (B, S); what has this shape is padded.

        Returns:
            The batch itself if nothing is missing; else one in which `valid` says what is real and
            no padding is a target.

        Raises:
            ValueError: If packed rows would have to be padded.
        """
        ids = batch["input_ids"]
        missing = -ids.shape[1] % self.multiple
        if not missing:
            return batch
        if "cu_seqlens" in batch:
            raise ValueError(
                f"`sequence_parallel: true` needs packed rows of a multiple of"
                f" {self.multiple} tokens (`tensor_parallel_world_size`), got {ids.shape[1]};"
                " change the sequence length"
            )
        whole = {"valid": torch.ones_like(ids, dtype=torch.bool), **batch}
        return {
            name: F.pad(each, (0, missing), value=_IGNORED if name == "labels" else 0)
            if each.shape == ids.shape
            else each
            for name, each in whole.items()
        }
