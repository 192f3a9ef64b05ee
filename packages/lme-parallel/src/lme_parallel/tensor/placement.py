"""Parameters that are cut by tensor parallelism first, then placed over data-parallel processes."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lme_parallel.materialize import InitialValue
from lme_parallel.placement import Placement, PlacementAround
from lme_parallel.shards import Region, Shard
from lme_parallel.tensor.collectives import Group
from lme_parallel.tensor.cut import Cut
from lme_parallel.tensor.plan import TensorPlan


@dataclass(frozen=True, slots=True)
class CutValues:
    """First values of parameters of which a part is here, by regions of that part."""

    initial_value: InitialValue
    """By regions of whole parameters."""
    cuts: Mapping[str, Cut]

    def __call__(self, name: str, region: Region | None) -> Tensor:
        """Return first values.

        Args:
            name: Of the parameter.
            region: Part of what is here; `None` for all of it.

        Returns:
            As `initial_value` gives them.
        """
        cut = self.cuts.get(name)
        if cut is None:
            return self.initial_value(name, region)
        places = cut.regions if region is None else tuple(cut.moved(region))
        parts = [self.initial_value(name, place) for place in places]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=cut.dim)


class CutParameters(PlacementAround):
    """A placement of parameters of which each tensor-parallel process has a part.

    Args:
        placement: Of what is here, over the data-parallel processes.
        plan: What is here.
        group: The tensor-parallel processes.
    """

    def __init__(self, placement: Placement, plan: TensorPlan, group: Group) -> None:
        super().__init__(placement)
        self._plan = plan
        self._group = group

    def shards(self) -> Mapping[str, Shard]:
        """Return which part of each whole parameter is here."""
        return {
            name: self._whole_shard(name, shard) for name, shard in self._placement.shards().items()
        }

    def finish(self) -> None:
        """Complete the gradients of whole parameters that met a part of the work only."""
        self._placement.finish()
        shares = [
            parameter
            for name, parameter in self._placement.named_parameters().items()
            if name in self._plan.partial and parameter.requires_grad
        ]
        if shares:
            self._sum(shares)

    @torch.no_grad()
    def _sum(self, parameters: list[nn.Parameter]) -> None:
        """Sum the gradients of parameters over the group, in one message a dtype."""
        kinds = {(each.dtype, each.device): [] for each in parameters}
        for each in parameters:
            if each.grad is None:
                each.grad = torch.zeros_like(each)
            kinds[each.dtype, each.device].append(each.grad)
        for gradients in kinds.values():
            total = self._group.all_reduce(torch.cat([each.flatten() for each in gradients]))
            parts = total.split([each.numel() for each in gradients])
            for gradient, part in zip(gradients, parts, strict=True):
                gradient.copy_(part.view_as(gradient))

    def _whole_shard(self, name: str, shard: Shard) -> Shard:
        cut = self._plan.cuts.get(name)
        if cut is None:
            return Shard(shard.shape, shard.boxes, shard.is_owner and self._group.rank == 0)
        boxes = tuple(each for box in shard.boxes for each in cut.boxes(box))
        return Shard(cut.shape, boxes, shard.is_owner)
