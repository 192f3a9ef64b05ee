"""Batches of whole sequences, cut into what a process has of them."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lme_parallel.context.layout import Layout

_IGNORED = -100


@dataclass(frozen=True, slots=True)
class CutBatch:
    """Gives each process of a context group its part of the same rows."""

    layout: Layout
    multiple: int = 1
    """Of which the length of a piece has to be one."""

    def __call__(self, batch: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Pad and cut.

        Args:
            batch: With `input_ids` (B, S); what has this shape is cut. `cu_seqlens` stays that of
                whole rows.

        Returns:
            Rows of which this process has S' / W tokens, where S' is S made a multiple of the
            number of pieces. Padding is no target, is not `valid`, and belongs to the last
            document of its row. `position_ids` say where tokens are. `sequences`, how many
            sequences these rows count for, is B in one process of the group and 0 in the others.
        """
        ids = batch["input_ids"]
        B, S = ids.shape
        missing = -S % (self.layout.num_pieces * self.multiple)
        whole = dict(batch)
        if "position_ids" not in whole:
            whole["position_ids"] = torch.arange(S, device=ids.device).expand(B, S)
        if missing:
            whole.setdefault("valid", torch.ones_like(ids, dtype=torch.bool))
        cut = {
            name: self._cut(name, each, missing) if each.shape == ids.shape else each
            for name, each in whole.items()
        }
        if missing and "cu_seqlens" in cut:
            bounds = cut["cu_seqlens"]
            rows = torch.div(bounds, S, rounding_mode="floor")
            cut["cu_seqlens"] = bounds + rows * missing
        cut["sequences"] = torch.full((), B if self.layout.rank == 0 else 0, device=ids.device)
        return cut

    def _cut(self, name: str, each: Tensor, missing: int) -> Tensor:
        value = _IGNORED if name == "labels" else 0
        return self.layout.cut(F.pad(each, (0, missing), value=value) if missing else each)
