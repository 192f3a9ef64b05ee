"""Loaders: order, position, slicing over ranks."""

import json
import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lme_data.collate import TokenCollator
from lme_data.loader import Ahead, EvaluationLoader, Loader
from lme_data.rows import TokenRows


class Counting:
    """A source whose row at place p is p, p, p, ...; remembers what was read."""

    names = ("n",)
    size = samples_per_epoch = 10_000
    num_samples = None
    sequence_length = 4

    def __init__(self, seed=0):
        self.read = []
        self._seed = seed

    def fetch(self, places):
        self.read += places.tolist()
        tokens = np.repeat(places[:, None], self.sequence_length + 1, axis=1)
        return TokenRows(tokens, np.zeros(len(places), np.int64))

    def describe(self):
        return {"seed": self._seed}

    def cursors(self, place):
        return {"n": place}

    def state(self, place):
        return {}

    def restore(self, state, place):
        pass


def loader(source=None, micro=2, total=8, rank=0, world=1, **settings_):
    source = source or Counting()
    return Loader(
        source,
        TokenCollator(source),
        micro_batch_size=micro,
        global_batch_size=total,
        data_rank=rank,
        data_world_size=world,
        **{"num_workers": 0, **settings_},
    )


def places(batch):
    return batch["input_ids"][:, 0].tolist()


@pytest.mark.parametrize(("micro", "world"), [(1, 1), (2, 1), (2, 2), (1, 8), (4, 2), (8, 1)])
def test_ranks_and_micro_batches_cut_the_same_global_batches(micro, world):
    loaders = [loader(micro=micro, rank=rank, world=world) for rank in range(world)]
    for step in range(3):
        seen = {}
        for _ in range(8 // (micro * world)):
            for each in loaders:
                batch = next(each)
                rows = (batch["token_index"][:, 0] // 4).tolist()
                seen.update(zip(rows, places(batch), strict=True))
                columns = batch["token_index"] - batch["token_index"][:, :1]
                assert (columns == torch.arange(4)).all()
        assert seen == {row: step * 8 + row for row in range(8)}


def test_rank_takes_its_part_of_each_round():
    second = loader(micro=2, rank=1, world=2)
    assert [places(next(second)) for _ in range(3)] == [[2, 3], [6, 7], [10, 11]]


@pytest.mark.parametrize("num_workers", [0, 1, 2, 5])
def test_workers_change_nothing(num_workers):
    source = Counting()
    jitter = source.fetch

    def slow(wanted):
        # Later batches are quicker: they must still come later.
        time.sleep(0.002 * (int(wanted[0]) % 3))
        return jitter(wanted)

    source.fetch = slow
    each = loader(source, num_workers=num_workers, num_samples=40)
    assert [places(batch) for batch in each] == [[n, n + 1] for n in range(0, 40, 2)]
    each.close()


@settings(deadline=None, derandomize=True, max_examples=40)
@given(
    consumed=st.integers(0, 20),
    before=st.sampled_from([(2, 1), (1, 2), (4, 2), (8, 1)]),
    after=st.sampled_from([(2, 1, 8), (1, 2, 8), (3, 2, 6), (5, 1, 5), (4, 4, 16)]),
)
def test_resume_with_other_ranks_and_batch_sizes_loses_and_repeats_nothing(consumed, before, after):
    micro, world = before
    first = [loader(micro=micro, rank=rank, world=world) for rank in range(world)]
    rounds = consumed * 8 // (micro * world)
    for each in first:
        for _ in range(rounds):
            next(each)
    states = [json.dumps(each.state_dict()) for each in first]
    assert len(set(states)) == 1
    micro, world, total = after
    second = [loader(micro=micro, total=total, rank=rank, world=world) for rank in range(world)]
    seen = []
    for each in second:
        each.load_state_dict(json.loads(states[0]))
    for _ in range(2 * total // (micro * world)):
        for each in second:
            seen += places(next(each))
    assert seen == list(range(consumed * 8, consumed * 8 + 2 * total))


def test_resume_reads_nothing_before_the_position():
    first = loader()
    for _ in range(100):
        next(first)
    source = Counting()
    second = loader(source)
    second.load_state_dict(first.state_dict())
    next(second)
    assert source.read == [200, 201]


def test_state_counts_what_was_given_out_not_what_was_prepared():
    each = loader(num_workers=2)
    next(each)
    next(each)
    assert each.state_dict()["position"] == each.position == 4
    each.close()


def test_loading_a_state_drops_prepared_batches():
    each = loader(num_workers=2)
    start = each.state_dict()
    first = places(next(each))
    next(each)
    each.load_state_dict(start)
    assert places(next(each)) == first
    each.skip_to(64)
    assert places(next(each)) == [64, 65]
    each.close()


def test_other_order_is_refused_with_the_difference():
    state = loader(Counting(seed=1)).state_dict()
    with pytest.raises(ValueError, match="`seed`: saved 1, now 2") as error:
        loader(Counting(seed=2)).load_state_dict(state)
    assert "`class_args.order: stable`" in str(error.value)


@pytest.mark.parametrize("state", [{}, {"format_version": 9}, {"format_version": 1, "inputs": {}}])
def test_what_is_no_state_is_refused(state):
    with pytest.raises(ValueError, match=r"version|not the saved one|no position"):
        loader().load_state_dict(state)


def test_end_drops_an_incomplete_round():
    assert len(list(loader(num_samples=9))) == 4


@pytest.mark.parametrize(
    "settings_",
    [{"micro": 3}, {"micro": 0}, {"rank": 2, "world": 2}, {"micro": 2, "world": 3}, {"total": 0}],
)
def test_sizes_that_do_not_divide_are_refused(settings_):
    with pytest.raises(ValueError, match=r"`global_batch_size`|`micro_batch_size`"):
        loader(**settings_)


def test_error_in_a_worker_surfaces_at_its_batch():
    def make(position):
        if position == 2:
            raise ValueError("poison")
        return {"n": torch.tensor(position)}

    ahead = Ahead(make, 2)
    assert [int(ahead.take(n, 1, lambda n: n > 9)["n"]) for n in (0, 1)] == [0, 1]
    with pytest.raises(ValueError, match="poison"):
        ahead.take(2, 1, lambda n: n > 9)
    assert int(ahead.take(3, 1, lambda n: n > 9)["n"]) == 3
    ahead.close()
    assert not [each for each in threading.enumerate() if each.name.startswith("lme-data")]


@pytest.mark.parametrize(("micro", "world"), [(1, 1), (2, 2), (4, 2), (8, 1)])
def test_evaluation_gives_the_same_samples_each_time_in_any_layout(micro, world):
    for _ in range(2):
        targets = []
        for rank in range(world):
            source = Counting()
            each = EvaluationLoader(
                source,
                TokenCollator(source),
                micro_batch_size=micro,
                global_batch_size=8,
                num_samples=13,
                data_rank=rank,
                data_world_size=world,
            )
            for batch in each:
                assert batch["input_ids"].shape == (micro, 4)
                targets += batch["labels"][batch["labels"] != -100].tolist()
            assert len(each) == -(-13 // (micro * world))
        assert sorted(targets) == sorted(list(range(13)) * 4)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_evaluation_can_be_left_early(num_workers):
    source = Counting()
    each = EvaluationLoader(
        source,
        TokenCollator(source),
        micro_batch_size=1,
        global_batch_size=1,
        num_samples=50,
        num_workers=num_workers,
    )
    for batch in each:
        assert places(batch) == [0]
        break
    assert places(next(iter(each))) == [0]


def test_an_order_with_a_period_begins_again_and_resumes_there():
    each = loader(period=24)
    taken = [places(next(each)) for _ in range(12)]
    assert [n for batch in taken for n in batch] == list(range(24))
    # At its end it says so; behind it the place is that of the next pass, the position goes on.
    assert (each.position, each.state_dict()["cursors"]) == (24, {"n": 24})
    for number in range(16):
        batch = next(each)
        assert places(batch) == [number * 2 % 24, number * 2 % 24 + 1]
    state = json.loads(json.dumps(each.state_dict()))
    assert (state["position"], state["cursors"]) == (56, {"n": 8})
    second = loader(period=24)
    second.load_state_dict(state)
    assert places(next(second)) == places(next(each)) == [8, 9]
