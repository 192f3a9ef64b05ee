from math import prod

import torch
from hypothesis import given
from hypothesis import strategies as st

from lme_parallel.shards import boxed, flat_range, overlap, whole


@given(st.data())
def test_a_flat_run_is_cut_into_few_boxes_that_hold_it(data):
    shape = tuple(data.draw(st.lists(st.integers(1, 5), max_size=4)))
    size = prod(shape)
    start = data.draw(st.integers(0, size))
    stop = data.draw(st.integers(start, size))
    shard = flat_range(shape, start, stop, is_owner=True)
    tensor = torch.arange(size).view(shape)
    local = tensor.flatten()[start:stop]
    found = torch.full(shape, -1)
    for region, view in shard.views(local):
        # The values of a box are those of its region, and lie one after the other.
        assert torch.equal(view, tensor[region])
        found[region] = view
    expected = torch.full((size,), -1)
    expected[start:stop] = local
    assert torch.equal(found.flatten(), expected)
    assert len(shard.boxes) <= max(1, 2 * len(shape) - 1)
    assert shard.is_whole == (stop - start == size)


def test_an_empty_part_has_no_boxes():
    assert boxed((4, 2), (slice(4, 4), slice(0, 2)), is_owner=False).boxes == ()
    assert not boxed((4, 2), (slice(4, 4), slice(0, 2)), is_owner=False).is_whole
    assert whole((0, 3)).is_whole
    assert whole(()).boxes[0].region == ()


def test_regions_overlap_where_every_dim_does():
    left = (slice(0, 3), slice(2, 4))
    assert overlap(left, (slice(2, 5), slice(0, 3))) == (slice(2, 3), slice(2, 3))
    assert overlap(left, (slice(3, 5), slice(0, 3))) is None
    assert overlap((), ()) == ()
