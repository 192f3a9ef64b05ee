"""Which part of a tensor this process holds, as boxes of the whole tensor."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

from torch import Tensor

Region = tuple[slice, ...]
"""One slice a dim, with start and stop, in elements of the whole tensor."""


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangular part of a tensor, stored in one run of the local one."""

    region: Region
    start: int
    """Place of its first element in the flattened local tensor."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Elements on each dim."""
        return tuple(each.stop - each.start for each in self.region)


@dataclass(frozen=True, slots=True)
class Shard:
    """What one process holds of a tensor."""

    shape: tuple[int, ...]
    """Of the whole tensor."""
    boxes: tuple[Box, ...]
    """What is here, none of it empty; no boxes: nothing is."""
    is_owner: bool
    """Whether this process, of those that hold the same part, speaks for it."""

    @property
    def is_whole(self) -> bool:
        """Whether everything is here."""
        return sum(prod(box.shape) for box in self.boxes) == prod(self.shape)

    def views(self, local: Tensor) -> Iterator[tuple[Region, Tensor]]:
        """Yield the region of each box and its values.

        Args:
            local: The tensor of this process, contiguous.

        Yields:
            Region of the whole tensor, and a view of `local` of the region's shape.
        """
        flat = local.view(-1)
        for box in self.boxes:
            shape = box.shape
            yield box.region, flat[box.start : box.start + prod(shape)].view(shape)


def whole(shape: Sequence[int], *, is_owner: bool = True) -> Shard:
    """Return the shard of a process that holds all of a tensor.

    Args:
        shape: Of the tensor.
        is_owner: Whether this process speaks for it.
    """
    region = tuple(slice(0, size) for size in shape)
    return boxed(shape, region, is_owner=is_owner)


def boxed(shape: Sequence[int], region: Region, *, is_owner: bool) -> Shard:
    """Return the shard of a process that holds one rectangular part.

    Args:
        shape: Of the whole tensor.
        region: What is here; may be empty.
        is_owner: Whether this process speaks for it.
    """
    box = Box(region, 0)
    return Shard(tuple(shape), (box,) if prod(box.shape) else (), is_owner)


def flat_range(shape: Sequence[int], start: int, stop: int, *, is_owner: bool) -> Shard:
    """Return the shard of a process that holds a run of the flattened tensor.

    Args:
        shape: Of the whole tensor.
        start: First element.
        stop: One after the last.
        is_owner: Whether this process speaks for it.
    """
    boxes, first = [], start
    for region in _range_regions(tuple(shape), start, stop):
        boxes.append(Box(region, first - start))
        first += prod(boxes[-1].shape)
    return Shard(tuple(shape), tuple(boxes), is_owner)


def overlap(left: Region, right: Region) -> Region | None:
    """Return what two regions have in common; `None` if that is nothing."""
    result = []
    for a, b in zip(left, right, strict=True):
        start, stop = max(a.start, b.start), min(a.stop, b.stop)
        if start >= stop:
            return None
        result.append(slice(start, stop))
    return tuple(result)


def inside(part: Region, of: Region) -> Region:
    """Return the region `part`, counted from the start of the region `of` that contains it."""
    return tuple(slice(a.start - b.start, a.stop - b.start) for a, b in zip(part, of, strict=True))


def _range_regions(shape: tuple[int, ...], start: int, stop: int) -> Iterator[Region]:
    """Cut a run of the flattened tensor into boxes, in order."""
    if start >= stop:
        return
    if not shape:
        yield ()
        return
    if len(shape) == 1:
        yield (slice(start, stop),)
        return
    row = prod(shape[1:])
    first, last = -(-start // row), stop // row
    if first > last:
        # Inside one row.
        yield from _inside_row(shape, last, start, stop)
        return
    yield from _inside_row(shape, first - 1, start, first * row)
    if first < last:
        yield (slice(first, last), *(slice(0, size) for size in shape[1:]))
    yield from _inside_row(shape, last, last * row, stop)


def _inside_row(shape: tuple[int, ...], index: int, start: int, stop: int) -> Iterator[Region]:
    offset = index * prod(shape[1:])
    for region in _range_regions(shape[1:], start - offset, stop - offset):
        yield (slice(index, index + 1), *region)
