"""Who writes which chunk: no chunk twice, none missing, each in the part of its writer."""

import itertools
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import distributed

from lme_parallel.checkpoint import arrays
from lme_parallel.checkpoint import sharing as sharing_module
from lme_parallel.checkpoint.arrays import ArrayLayout, chunk_shape
from lme_parallel.checkpoint.crew import Crew
from lme_parallel.checkpoint.errors import CheckpointError
from lme_parallel.checkpoint.sharing import LocalTensor, aligned_chunks, share_out
from lme_parallel.shards import boxed, flat_range, overlap, whole
from lme_parallel.testing import run_distributed


def layout_of(shape):
    return ArrayLayout(tuple(shape), torch.float32, chunk_shape(shape, 4))


def cut(shape, dim, parts):
    """Regions of a cut by ceil division, as torch cuts."""
    step = -(-shape[dim] // parts)
    starts = [min(each * step, shape[dim]) for each in range(parts + 1)]
    return [
        tuple(slice(a, b) if each == dim else slice(0, size) for each, size in enumerate(shape))
        for a, b in itertools.pairwise(starts)
        if a < b
    ]


@settings(deadline=None)
@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=3),
    st.integers(1, 6),
    st.data(),
)
def test_chunks_of_an_even_cut_lie_in_one_part(shape, parts, data):
    dim = data.draw(st.integers(0, len(shape) - 1))
    regions = cut(shape, dim, parts)
    chunks = aligned_chunks(layout_of(shape), regions)
    assert chunks is not None
    layout = ArrayLayout(tuple(shape), torch.float32, chunks)
    for _, chunk in layout.pieces():
        assert sum(overlap(chunk, each) is not None for each in regions) == 1


@pytest.mark.parametrize(
    ("shape", "dim", "parts"),
    [((128256, 4096), 0, 8), ((4099 * 8, 8192), 0, 8), ((4096, 14336), 1, 4), ((2**26,), 0, 2)],
)
def test_chunks_of_large_parts_stay_below_64_mib(shape, dim, parts):
    chunks = aligned_chunks(layout_of(shape), cut(shape, dim, parts))
    assert chunks is not None
    assert prod(chunks) * 4 <= 2**26
    # And are not much smaller than they need be.
    assert prod(chunks) * 4 >= 2**21


def test_parts_cut_too_unevenly_have_no_grid():
    # Six rows over two ranks, each over two: 0-2, 2-3, 3-5 and 5-6 still have one of rows.
    borders = [0, 2, 3, 5, 6]
    regions = [(slice(a, b),) for a, b in itertools.pairwise(borders)]
    assert aligned_chunks(layout_of((6,)), regions) == (1,)
    borders = [0, 25_129, 37_693, 50_257]
    regions = [(slice(a, b), slice(0, 8)) for a, b in itertools.pairwise(borders)]
    assert aligned_chunks(layout_of((50_257, 8)), regions) is None


SHAPES = {"embedding": (19, 8), "bias": (7,), "scalar": (), "cube": (3, 4, 5)}


def share(kind):
    """Hold parts of tensors, decide who writes what, and return it."""
    # Several chunks to an array, so that parts of one go to different writers.
    arrays.MAX_CHUNK_BYTES = sharing_module.MAX_CHUNK_BYTES = 128
    rank, size = distributed.get_rank(), distributed.get_world_size()
    crew = Crew.of(size)
    tensors = []
    for name, shape in SHAPES.items():
        total = prod(shape)
        full = torch.arange(total).view(shape).to(torch.bfloat16)
        step = -(-total // size)
        start, stop = min(rank * step, total), min((rank + 1) * step, total)
        if kind == "flat" and shape:
            shard = flat_range(shape, start, stop, is_owner=True)
            local = full.flatten()[start:stop]
        elif kind == "rows" and shape:
            regions = cut(shape, 0, size)
            empty = (slice(shape[0], shape[0]), *(slice(0, each) for each in shape[1:]))
            region = regions[rank] if rank < len(regions) else empty
            shard, local = boxed(shape, region, is_owner=True), full[region]
        else:
            shard, local = whole(shape, is_owner=rank == 1), full
        tensors.append(LocalTensor(f"model/{name}", shard, local))
    saved, layouts = share_out(tensors, crew)
    return [
        [
            [each.path, key, [[s.start, s.stop] for s in region], part.clone()]
            for each in saved
            for key, region, part in each.chunks()
        ],
        {path: list(layout.chunks) for path, layout in layouts.items()},
    ]


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("kind", ["flat", "rows", "copies"])
def test_every_chunk_is_written_once_with_its_values(kind, size):
    ranks = run_distributed(share, size, kind)
    assert all(layouts == ranks[0][1] for _, layouts in ranks)
    written = [tuple(each[:2]) for saved, _ in ranks for each in saved]
    assert len(written) == len(set(written))
    for name, shape in SHAPES.items():
        full = torch.arange(prod(shape)).view(shape).to(torch.bfloat16)
        chunks = tuple(ranks[0][1][f"model/{name}"])
        layout = ArrayLayout(shape, torch.bfloat16, chunks)
        assert {key for path, key in written if path == f"model/{name}"} == {
            key for key, _ in layout.pieces()
        }
        for saved, _ in ranks:
            for path, _, bounds, values in saved:
                if path == f"model/{name}":
                    assert torch.equal(values, full[tuple(slice(a, b) for a, b in bounds)])
    if kind == "copies":
        # Their owner writes them, not always the first rank.
        assert ranks[0][0] == []


def hold_half():
    rank = distributed.get_rank()
    shard = boxed((4,), (slice(rank, rank + 1),), is_owner=True)
    share_out([LocalTensor("model/a", shard, torch.ones(1))], Crew.of(2))


def disagree():
    shape = (4 + distributed.get_rank(),)
    share_out([LocalTensor("model/a", whole(shape), torch.ones(shape))], Crew.of(2))


def test_a_part_that_nobody_holds_is_an_error():
    with pytest.raises(RuntimeError, match="of model/a the processes hold 2 elements, not 4"):
        run_distributed(hold_half, 2)
    with pytest.raises(RuntimeError, match=r"rank 1 has model/a as float32 \(5,\)"):
        run_distributed(disagree, 2)


def test_one_process_decides_alone():
    saved, layouts = share_out([LocalTensor("model/a", whole((3,)), torch.ones(3))], Crew())
    assert [each.region for each in saved] == [None]
    assert layouts["model/a"].chunks == (3,)


def test_a_failure_alone_is_raised_as_it_is():
    with pytest.raises(CheckpointError, match="mine"), Crew().together():
        raise CheckpointError("mine")
