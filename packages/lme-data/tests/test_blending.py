"""The greedy blend against published values and against the loop it replaces."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lme_data.blending import greedy_choices, places_within

GOLDEN = [
    ([0.2, 0.5, 0.3], [1, 2, 0, 1, 2, 1, 0, 1, 2, 1, 0, 1], [0, 0, 0, 1, 1, 2, 1, 3, 2, 4, 2, 5]),
    ([0.5, 0.5], [0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1], [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]),
    ([0.7, 0.2, 0.1], [0, 1, 0, 2, 0, 0, 1, 0, 0, 0, 0, 1], [0, 0, 1, 0, 2, 3, 1, 4, 5, 6, 7, 2]),
]


def loop(weights, size):
    counts, choices = [0] * len(weights), []
    for number in range(size):
        errors = [
            weight * max(number, 1) - count for weight, count in zip(weights, counts, strict=True)
        ]
        choice = errors.index(max(errors))
        choices.append(choice)
        counts[choice] += 1
    return choices


@pytest.mark.parametrize(("weights", "datasets", "samples"), GOLDEN)
def test_blend_equals_the_published_one(weights, datasets, samples):
    choices, counts = greedy_choices(weights, 12)
    assert choices.dtype == np.int16
    assert choices.tolist() == datasets
    assert places_within(choices, len(weights)).tolist() == samples
    assert counts.tolist() == np.bincount(datasets, minlength=len(weights)).tolist()


# The loop it is compared with is slow.
@settings(deadline=None, derandomize=True, max_examples=15)
@given(
    raw=st.lists(st.floats(1e-7, 1.0), min_size=1, max_size=9),
    size=st.integers(4096, 9000),
)
def test_lanes_equal_the_loop_for_any_weights(raw, size):
    weights = [weight / sum(raw) for weight in raw]
    choices, counts = greedy_choices(weights, size)
    expected = loop(weights, size)
    assert choices.tolist() == expected
    assert counts.tolist() == np.bincount(expected, minlength=len(weights)).tolist()


@pytest.mark.parametrize(
    "raw",
    [
        # A share so small that whole stretches pass between two of its samples.
        [1e-4, 0.5, 0.4999],
        # Equal shares: every choice is a tie.
        [1.0] * 8,
        # More corpora than are compared one by one.
        [1.0 / rank for rank in range(1, 41)],
        # Shares over five orders of magnitude: guesses are wrong and must be repaired.
        np.exp(3 * np.random.RandomState(5).randn(30)).tolist(),
    ],
    ids=["rare", "ties", "many", "wild"],
)
def test_lanes_equal_the_loop_over_many_stretches(raw):
    weights = [weight / sum(raw) for weight in raw]
    choices, _ = greedy_choices(weights, 20_000)
    assert choices.tolist() == loop(weights, 20_000)


@settings(deadline=None, derandomize=True, max_examples=30)
@given(
    raw=st.lists(st.floats(1e-3, 1.0), min_size=2, max_size=6),
    first=st.integers(1, 6000),
    second=st.integers(1, 6000),
)
def test_blend_goes_on_from_counts(raw, first, second):
    weights = [weight / sum(raw) for weight in raw]
    whole, total = greedy_choices(weights, first + second)
    head, counts = greedy_choices(weights, first)
    tail, end = greedy_choices(weights, second, start=first, counts=counts)
    assert np.concatenate([head, tail]).tolist() == whole.tolist()
    assert end.tolist() == total.tolist()


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    raw=st.lists(st.floats(0.01, 1.0), min_size=2, max_size=2),
    size=st.integers(1, 3000),
)
def test_two_shares_stay_within_one_sample(raw, size):
    weights = [weight / sum(raw) for weight in raw]
    choices, _ = greedy_choices(weights, size)
    for corpus, weight in enumerate(weights):
        taken = np.cumsum(choices == corpus)
        due = weight * np.arange(1, size + 1)
        assert np.abs(taken - due).max() <= 1 + 1e-9
