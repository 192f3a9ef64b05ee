"""Which process writes which chunk of a checkpoint: each what it holds, as far as that goes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import gcd, prod

import torch
from torch import Tensor

from lme_parallel.checkpoint.arrays import (
    MAX_CHUNK_BYTES,
    ArrayLayout,
    SavedTensor,
    chunk_shape,
    dtype_name,
    dtype_of,
)
from lme_parallel.checkpoint.crew import Crew
from lme_parallel.checkpoint.documents import Json
from lme_parallel.checkpoint.errors import CheckpointError
from lme_parallel.shards import Region, Shard, inside, overlap

# More chunks than this for each part that a process holds, and it is cheaper to send rows.
_MOST_CHUNKS = 4


@dataclass(frozen=True, slots=True)
class LocalTensor:
    """A tensor of a checkpoint, as far as it is here."""

    path: str
    """Folder inside the checkpoint."""
    shard: Shard
    tensor: Tensor
    """What is here, on any device."""


@dataclass(frozen=True, slots=True)
class _Held:
    rank: int
    region: Region


def share_out(
    tensors: Sequence[LocalTensor], crew: Crew
) -> tuple[list[SavedTensor], dict[str, ArrayLayout]]:
    """Decide who writes what, and send what cannot be written where it is.

    Chunks are cut so that each lies in one process's part. Where parts are cut too unevenly for
    that, a chunk is put together by the process that holds most of it.

    Args:
        tensors: Of this process.
        crew: All processes; each calls this at the same time.

    Returns:
        What this process writes, and the layout of every array of the checkpoint.

    Raises:
        CheckpointError: If a part is held by nobody, or processes disagree about a tensor.
    """
    if crew.size == 1:
        saved = [
            SavedTensor(each.path, ArrayLayout.of(each.tensor), each.tensor) for each in tensors
        ]
        return saved, {each.path: each.layout for each in saved}
    local = {each.path: replace(each, tensor=each.tensor.contiguous()) for each in tensors}
    descriptions = crew.gather([_describe(each) for each in tensors])
    saved, layouts = [], {}
    for path, (layout, held) in sorted(_merge(descriptions).items()):
        chunks = aligned_chunks(layout, [each.region for each in held])
        here = local.get(path)
        if chunks is not None:
            layouts[path] = ArrayLayout(layout.shape, layout.dtype, chunks)
            own = {_key(each.region) for each in held if each.rank == crew.rank}
            if here is not None:
                saved += [
                    SavedTensor(path, layouts[path], view, region)
                    for region, view in here.shard.views(here.tensor)
                    if _key(region) in own
                ]
        else:
            layouts[path] = layout
            saved += _put_together(path, layout, held, here, crew)
    return saved, layouts


def aligned_chunks(layout: ArrayLayout, regions: Sequence[Region]) -> tuple[int, ...] | None:
    """Choose a grid in which no chunk crosses the border of a region.

    Args:
        layout: Shape and dtype; its own chunks are those of a whole tensor.
        regions: Parts that together are the whole.

    Returns:
        Elements of a chunk on each dim; `None` if there would be too many chunks.
    """
    steps = []
    for dim, size in enumerate(layout.shape):
        step = gcd(*(region[dim].start for region in regions)) or max(1, size)
        # The last part may be shorter than a step; any other border is a start.
        if any(each[dim].stop != size and each[dim].stop % step for each in regions):
            return None
        steps.append(step)
    chunks = _cut_small(steps, layout)
    count = prod(-(-size // chunk) for size, chunk in zip(layout.shape, chunks, strict=True))
    whole = prod(layout.grid)
    return chunks if count <= _MOST_CHUNKS * (len(regions) + whole) else None


def _cut_small(steps: list[int], layout: ArrayLayout) -> tuple[int, ...]:
    """Cut chunks to at most 64 MiB, staying on the grid of the steps."""
    chunks = list(steps)
    for dim, size in enumerate(layout.shape):
        row_bytes = prod(chunks[:dim] + chunks[dim + 1 :]) * layout.dtype.itemsize
        if chunks[dim] * row_bytes <= MAX_CHUNK_BYTES:
            break
        most = max(1, MAX_CHUNK_BYTES // row_bytes)
        if chunks[dim] >= size:
            chunks[dim] = -(-size // -(-size // most))
            continue
        divisor = next(each for each in range(most, 0, -1) if chunks[dim] % each == 0)
        # A step without useful divisors is left whole; the next dim is cut instead.
        if divisor * 8 >= most or dim == len(chunks) - 1:
            chunks[dim] = divisor
    return tuple(chunks)


def _describe(tensor: LocalTensor) -> Json:
    shard = tensor.shard
    boxes = [[[each.start, each.stop] for each in box.region] for box in shard.boxes]
    return [
        tensor.path,
        dtype_name(tensor.tensor.dtype),
        list(shard.shape),
        boxes if shard.is_owner else [],
    ]


def _merge(descriptions: Sequence[Json]) -> dict[str, tuple[ArrayLayout, list[_Held]]]:
    found: dict[str, tuple[ArrayLayout, dict[tuple[tuple[int, int], ...], _Held]]] = {}
    for rank, listed in enumerate(descriptions):
        for path, name, shape, boxes in listed:
            dtype = dtype_of(name)
            layout = ArrayLayout(tuple(shape), dtype, chunk_shape(shape, dtype.itemsize))
            known, held = found.setdefault(path, (layout, {}))
            if known != layout:
                raise CheckpointError(
                    f"rank {rank} has {path} as {name} {tuple(shape)}, others as"
                    f" {dtype_name(known.dtype)} {known.shape}"
                )
            for box in boxes:
                region = tuple(slice(start, stop) for start, stop in box)
                # Of equal parts the first one counts.
                held.setdefault(_key(region), _Held(rank, region))
    result = {}
    for path, (layout, held) in found.items():
        covered = sum(prod(b - a for a, b in key) for key in held)
        if covered != prod(layout.shape):
            raise CheckpointError(
                f"of {path} the processes hold {covered} elements, not {prod(layout.shape)}"
            )
        result[path] = (layout, list(held.values()))
    return result


def _put_together(
    path: str, layout: ArrayLayout, held: Sequence[_Held], here: LocalTensor | None, crew: Crew
) -> list[SavedTensor]:
    """Send parts of chunks to those who write them, and return the chunks written here."""
    saved: list[SavedTensor] = []
    sent: list[tuple[int, Tensor]] = []
    received: list[tuple[int, Tensor]] = []
    targets: list[Tensor] = []
    for _, region in layout.pieces():
        parts = list(_parts(region, held))
        writer = max(parts, key=lambda part: prod(each.stop - each.start for each in part[1]))[0]
        chunk = None
        if writer == crew.rank:
            size = tuple(each.stop - each.start for each in region)
            chunk = torch.empty(size, dtype=layout.dtype)
            saved.append(SavedTensor(path, layout, chunk, region))
        for rank, part in parts:
            if chunk is not None and rank == crew.rank:
                chunk[inside(part, region)] = _local_part(here, part)
            elif chunk is not None:
                target = chunk[inside(part, region)]
                targets.append(target)
                received.append((rank, torch.empty(target.shape, dtype=layout.dtype)))
            elif rank == crew.rank:
                sent.append((writer, _local_part(here, part).cpu().contiguous()))
    crew.exchange(sent, received)
    for target, (_, values) in zip(targets, received, strict=True):
        target.copy_(values)
    return saved


def _parts(region: Region, held: Sequence[_Held]) -> Iterator[tuple[int, Region]]:
    for each in held:
        part = overlap(region, each.region)
        if part is not None:
            yield each.rank, part


def _local_part(here: LocalTensor | None, part: Region) -> Tensor:
    if here is not None:
        for region, view in here.shard.views(here.tensor):
            if overlap(part, region) == part:
                return view[inside(part, region)]
    raise CheckpointError("a part of a tensor is not where this process said it was")


def _key(region: Region) -> tuple[tuple[int, int], ...]:
    return tuple((each.start, each.stop) for each in region)
