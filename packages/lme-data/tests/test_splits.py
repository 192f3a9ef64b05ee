"""Splits and sample counts against published values."""

import pytest

from lme_data.splits import blend_sizes, parse_split, sample_targets, split_bounds


@pytest.mark.parametrize(
    ("split", "num_sequences", "bounds"),
    [
        ("98,1,1", 1003, [0, 983, 993, 1003]),
        ("99.5,0.5,0", 10, [0, 10, 10, 10]),
        ("1", 7, [0, 7, 7, 7]),
        ("1,1,1", 10, [0, 4, 7, 10]),
        # A plain number, as YAML reads `split: 100`.
        (100.0, 7, [0, 7, 7, 7]),
    ],
)
def test_bounds_equal_the_published_ones(split, num_sequences, bounds):
    assert split_bounds(parse_split(split), num_sequences) == bounds


@pytest.mark.parametrize("split", ["", "a,b", "0,0,0", "1,1,1,1", "-1,2", "1.2.3"])
def test_split_that_is_none_is_refused(split):
    with pytest.raises(ValueError, match="`split` must be"):
        parse_split(split)


def test_blend_sizes_equal_the_published_ones():
    assert blend_sizes([0.3, 0.7], [100, 10, 0]) == [[31, 4, 0], [71, 8, 0]]


@pytest.mark.parametrize(("interval", "val"), [(10, 11 * 5 * 8), (None, 5 * 8), (101, 5 * 8)])
def test_targets_follow_the_formula(interval, val):
    targets = sample_targets(
        num_training_steps=100, global_batch_size=8, eval_interval=interval, eval_steps=5
    )
    assert targets == (800, val, 40)
