import threading
import time

import pytest
import torch

from lme_core.training.batches import BatchStream, FixedBatches, count_tokens


def stream(loader, **settings):
    settings = {"gradient_accumulation_steps": 2, "device": "cpu", **settings}
    return BatchStream(loader, **settings)


def ids(batches):
    return [batch["input_ids"].tolist() for batch in batches]


def plain(loader, count):
    return ids([next(loader) for _ in range(count)])


def test_steps_hold_the_loaders_batches_in_order(counting_loader):
    steps = stream(counting_loader())
    got = [next(steps) for _ in range(3)]
    steps.close()
    assert [i for step in got for i in ids(step.micro_batches)] == plain(counting_loader(), 6)
    assert [step.tokens for step in got] == [2 * 2 * 12] * 3


def test_the_position_is_that_of_the_steps_handed_out(counting_loader):
    loader = counting_loader()
    steps = stream(loader)
    next(steps)
    next(steps)
    # The third step has been fetched ahead and does not count.
    steps._pending.result()
    assert loader.position == 6
    assert steps.state_dict() == {"position": 4}
    steps.close()
    assert loader.position == 4


def test_a_restored_stream_goes_on_where_it_was(counting_loader):
    steps = stream(counting_loader())
    for _ in range(3):
        next(steps)
    state = steps.state_dict()
    expected = ids(next(steps).micro_batches)
    steps.close()

    other = stream(counting_loader())
    next(other)
    other.load_state_dict(state)
    assert ids(next(other).micro_batches) == expected
    other.close()


def test_a_closed_stream_can_go_on(counting_loader):
    steps = stream(counting_loader())
    first = ids(next(steps).micro_batches)
    steps.close()
    second = ids(next(steps).micro_batches)
    steps.close()
    assert first + second == plain(counting_loader(), 4)


def test_the_end_of_the_data_ends_the_steps(counting_loader):
    # Five batches are two steps of two; the fifth makes no step.
    assert len(list(stream(counting_loader(length=5)))) == 2


def test_an_error_in_the_loader_reaches_the_loop(counting_loader):
    class Broken(counting_loader):
        def __next__(self):
            raise ValueError("token 99 of document 3 is outside the vocabulary")

    steps = stream(Broken())
    with pytest.raises(ValueError, match="token 99 of document 3"):
        next(steps)
    steps.close()


def test_the_next_step_is_read_while_this_one_runs(counting_loader):
    third = threading.Event()

    class Watched(counting_loader):
        def __next__(self):
            if self.position == 2:
                third.set()
            return super().__next__()

    steps = stream(Watched())
    next(steps)
    # Nobody has asked for the second step.
    assert third.wait(timeout=20)
    steps.close()


def test_waiting_is_measured(counting_loader):
    class Slow(counting_loader):
        def __next__(self):
            time.sleep(0.01)
            return super().__next__()

    steps = stream(Slow())
    assert next(steps).wait_seconds >= 0.02
    steps._pending.result()
    assert next(steps).wait_seconds < 0.02
    steps.close()


def test_padding_is_not_counted_and_replicas_are():
    valid = torch.tensor([[True, True, False], [True, False, False]])
    batch = {"input_ids": torch.zeros(2, 3, dtype=torch.long), "valid": valid}
    assert count_tokens(batch) == 3
    assert count_tokens({"input_ids": batch["input_ids"]}) == 6

    class Padded:
        def __next__(self):
            return batch

        def state_dict(self):
            return {}

        def load_state_dict(self, state):
            pass

    steps = stream(Padded(), num_replicas=4)
    assert next(steps).tokens == 2 * 3 * 4
    steps.close()


def test_fixed_batches_are_the_same_every_time(counting_loader):
    loader = counting_loader()
    next(loader)
    fixed = FixedBatches(loader, 3)
    assert ids(fixed) == ids(fixed)
    assert len(ids(fixed)) == 3
    assert len(ids(FixedBatches(counting_loader(length=2), 3))) == 2
