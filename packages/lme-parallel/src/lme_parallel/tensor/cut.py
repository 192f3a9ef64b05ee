"""Which part of a parameter a tensor-parallel process holds: one run of a dim, or one a section."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from lme_parallel.shards import Box, Region


@dataclass(frozen=True, slots=True)
class Cut:
    """Which part of a parameter is here."""

    shape: tuple[int, ...]
    """Of the whole parameter."""
    dim: int
    """The one that is cut; 0 where there are several runs."""
    runs: tuple[tuple[int, int], ...]
    """Start and stop of each run of that dim, ascending; here they follow each other."""

    @property
    def regions(self) -> tuple[Region, ...]:
        """What is here, in elements of the whole, in the order of the local parameter."""
        return tuple(self._region(*run) for run in self.runs)

    def take(self, whole: Tensor) -> Tensor:
        """Return a copy of what is here.

        Args:
            whole: Of the shape `shape`.
        """
        parts = [whole[region] for region in self.regions]
        if len(parts) > 1:
            return torch.cat(parts, dim=self.dim)
        return parts[0].clone(memory_format=torch.contiguous_format)

    def moved(self, region: Region) -> Iterator[Region]:
        """Find a region of what is here in the whole.

        Args:
            region: In elements of the local parameter.

        Yields:
            Regions of the whole, none of them empty, whose values follow each other on `dim`.
        """
        wanted, first = region[self.dim], 0
        for start, stop in self.runs:
            low, high = max(wanted.start, first), min(wanted.stop, first + stop - start)
            if low < high:
                place = slice(low - first + start, high - first + start)
                yield (*region[: self.dim], place, *region[self.dim + 1 :])
            first += stop - start

    def boxes(self, box: Box) -> Iterator[Box]:
        """Cut a box of what is here into boxes of the whole.

        Args:
            box: In elements of the local parameter.

        Yields:
            Boxes that lie in the local tensor as they follow each other.
        """
        # Several runs are of dim 0, so that each part of a box is a run of its memory.
        start = box.start
        for region in self.moved(box.region):
            yield Box(region, start)
            start += prod(each.stop - each.start for each in region)

    def _region(self, start: int, stop: int) -> Region:
        whole = [slice(0, size) for size in self.shape]
        return (*whole[: self.dim], slice(start, stop), *whole[self.dim + 1 :])


def even_runs(sections: Sequence[int], size: int, rank: int) -> tuple[tuple[int, int], ...]:
    """Give each process the same part of every section.

    Args:
        sections: Lengths, of which each is a multiple of `size`, in order.
        size: Processes.
        rank: Number of this one.

    Returns:
        Start and stop of each run; runs that touch are one.
    """
    runs: list[tuple[int, int]] = []
    first = 0
    for length in sections:
        share = length // size
        start = first + rank * share
        if runs and runs[-1][1] == start:
            runs[-1] = (runs[-1][0], start + share)
        else:
            runs.append((start, start + share))
        first += length
    return tuple(runs)
