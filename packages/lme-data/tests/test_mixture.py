"""Mixtures: exact shares, a cursor per source, weights that change between runs."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lme_data import mixture as module
from lme_data.blending import greedy_choices, places_within
from lme_data.mixture import Blend, Mixture, Sequential


class Numbers:
    """A source whose sample at a place is the place."""

    def __init__(self, name, size=1000):
        self.names = (name,)
        self.size = self.samples_per_epoch = size
        self.num_samples = None

    def describe(self):
        return {"size": self.size}

    def cursors(self, place):
        return {self.names[0]: place}

    def state(self, place):
        return {}

    def restore(self, state, place):
        pass


def shares(raw):
    return [weight / sum(raw) for weight in raw]


def test_windows_give_the_choices_of_one_long_blend(monkeypatch):
    monkeypatch.setattr(module, "_WINDOW", 100)
    monkeypatch.setattr(module, "_EXTEND_WINDOWS", 7)
    weights = shares([3, 1, 2.5])
    choices, _ = greedy_choices(weights, 5000)
    within = places_within(choices, 3)
    blend = Blend(weights)
    # Forward, back, across windows, and far ahead first.
    for places in (np.arange(4950, 5000), np.arange(90, 120), np.array([0, 4999, 100, 99])):
        found = blend.look_up(places)
        assert found[0].tolist() == choices[places].tolist()
        assert found[1].tolist() == within[places].tolist()
    for place in (0, 1, 99, 100, 101, 4321):
        assert blend.counts(place).tolist() == np.bincount(choices[:place], minlength=3).tolist()


def test_sequential_takes_one_after_another():
    order = Sequential([2, 0, 3])
    choices, within = order.look_up(np.arange(5))
    assert choices.tolist() == [0, 0, 2, 2, 2]
    assert within.tolist() == [0, 1, 0, 1, 2]
    assert [order.counts(place).tolist() for place in (0, 1, 3, 5)] == [
        [0, 0, 0],
        [1, 0, 0],
        [2, 0, 1],
        [2, 0, 3],
    ]


@pytest.fixture(autouse=True)
def small_windows(monkeypatch):
    monkeypatch.setattr(module, "_WINDOW", 128)


@settings(
    deadline=None,
    derandomize=True,
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    stages=st.lists(
        st.tuples(
            st.lists(st.floats(0.02, 1.0), min_size=3, max_size=3),
            st.integers(1, 60),
        ),
        min_size=1,
        max_size=4,
    )
)
def test_no_sample_is_lost_or_repeated_when_weights_change(stages):
    names, state, place, served = "abc", None, 0, {name: [] for name in "abc"}
    for raw, steps in stages:
        weights = shares(raw)
        mixture = Mixture([Numbers(name) for name in names], weights, order="stable")
        if state is not None:
            mixture.restore(state, place)
        before = mixture.cursors(place)
        choices, within = mixture.look_up(np.arange(place, place + steps))
        for choice, number in zip(choices.tolist(), within.tolist(), strict=True):
            served[names[choice]].append(number)
        place += steps
        state = mixture.state(place)
        after = mixture.cursors(place)
        taken = [after[name] - before[name] for name in names]
        # A run of the greedy rule stays near the shares; two samples cover three sources.
        assert all(abs(t - w * steps) <= 2 for t, w in zip(taken, weights, strict=True))
    for name, numbers in served.items():
        assert numbers == list(range(len(numbers))), name
    assert sum(map(len, served.values())) == place


def test_same_weights_go_on_as_if_never_stopped():
    weights = shares([1, 2, 4])
    whole = Mixture([Numbers(name) for name in "abc"], weights, order="stable")
    resumed = Mixture([Numbers(name) for name in "abc"], weights, order="stable")
    resumed.restore(whole.state(37), 37)
    places = np.arange(37, 400)
    for one, other in zip(whole.look_up(places), resumed.look_up(places), strict=True):
        assert one.tolist() == other.tolist()


def test_sources_may_come_and_go_in_the_stable_order():
    first = Mixture([Numbers("a"), Numbers("b")], [0.5, 0.5], order="stable")
    second = Mixture([Numbers("c"), Numbers("b")], [0.5, 0.5], order="stable")
    second.restore(first.state(10), 10)
    assert second.cursors(10) == {"c": 0, "b": 5}
    assert second.cursors(14) == {"c": 2, "b": 7}


def test_other_weights_are_refused_in_megatron_order():
    first = Mixture([Numbers("a"), Numbers("b")], [0.5, 0.5], order="megatron")
    second = Mixture([Numbers("a"), Numbers("b")], [0.4, 0.6], order="megatron")
    with pytest.raises(ValueError, match=r"`class_args\.order: stable`"):
        second.restore(first.state(10), 10)
