"""Experts of which some are here, placed over the data-parallel processes that have the same."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from lme_parallel.materialize import InitialValue
from lme_parallel.placement import Placement, PlacementAround
from lme_parallel.shards import Box, Region, Shard


@dataclass(frozen=True, slots=True)
class ExpertCut:
    """Which experts of a parameter are here."""

    shape: tuple[int, ...]
    """Of the parameter with all experts."""
    start: int
    stop: int

    def region(self, part: Region | None = None) -> Region:
        """Return a part of what is here (`None`: all of it) in elements of the parameter."""
        if part is None:
            return (slice(self.start, self.stop), *(slice(0, size) for size in self.shape[1:]))
        experts, *others = part
        return (slice(experts.start + self.start, experts.stop + self.start), *others)


@dataclass(frozen=True, slots=True)
class ExpertValues:
    """First values of parameters of which some experts are here, by regions of these."""

    initial_value: InitialValue
    """By regions of parameters with all experts."""
    cuts: Mapping[str, ExpertCut]

    def __call__(self, name: str, region: Region | None) -> Tensor:
        """Return first values of a part of what is here; `None`: of all of it."""
        cut = self.cuts.get(name)
        return self.initial_value(name, region if cut is None else cut.region(region))


class CutExperts(PlacementAround):
    """A placement of a model of whose experts some are here.

    Args:
        placement: Of what is here, over the data-parallel processes: it sums the gradients of
            experts over those that have the same.
        cuts: What is here of each parameter by experts.
    """

    def __init__(self, placement: Placement, cuts: Mapping[str, ExpertCut]) -> None:
        super().__init__(placement)
        self._cuts = cuts

    def shards(self) -> Mapping[str, Shard]:
        """Return which part of each whole parameter is here."""
        return {name: self._whole(name, shard) for name, shard in self._placement.shards().items()}

    def _whole(self, name: str, shard: Shard) -> Shard:
        cut = self._cuts.get(name)
        if cut is None:
            return shard
        boxes = tuple(Box(cut.region(box.region), box.start) for box in shard.boxes)
        return Shard(cut.shape, boxes, shard.is_owner)
