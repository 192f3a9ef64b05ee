"""Any rank of a run killed at any step of a save: the newest valid checkpoint is whole."""

import json
import os
import resource
import signal
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import pytest
import torch
from torch import distributed

from lme_parallel.args import DistributedArgs
from lme_parallel.checkpoint.args import SaveArgs
from lme_parallel.checkpoint.checkpointer import Checkpointer
from lme_parallel.checkpoint.errors import CheckpointError
from lme_parallel.checkpoint.layout import checkpoint_steps
from lme_parallel.checkpoint.reader import newest_valid
from lme_parallel.shards import boxed, whole
from lme_parallel.testing import kill_this_process, run_distributed, run_groups_until_ended
from lme_parallel.topology import Topology

KILLS = 100
RANKS = 2
# A killed process's peer says this, and ends.
TYPED_ERROR = 3


@dataclass
class State:
    step: int = 0
    tokens: int = 0


def value(name, step):
    """The whole tensor of a name after a step; every element tells step and place."""
    shape = {"cut": (6, 4), "uneven": (5, 3), "whole": (3,)}[name.partition(".")[0]]
    size = torch.Size(shape).numel()
    return torch.arange(size, dtype=torch.float32).view(shape) + 100 * step + len(name) / 64


class Run:
    """Two ranks with a tensor cut in halves, one cut 1 to 4, and one that both hold."""

    def __init__(self, folder, *, point=None, is_async=False):
        rank = distributed.get_rank()
        rows = {"cut": ((0, 3), (3, 6)), "uneven": ((0, 1), (1, 5))}
        self.regions = {
            name: (slice(*parts[rank]), slice(0, value(name, 0).shape[1]))
            for name, parts in rows.items()
        }
        self.regions["whole"] = (slice(0, 3),)
        self.parameters = {
            name: torch.nn.Parameter(value(name, 0)[region].clone())
            for name, region in self.regions.items()
        }
        shards = {
            name: boxed(value(name, 0).shape, region, is_owner=True)
            for name, region in self.regions.items()
            if name != "whole"
        }
        shards["whole"] = whole((3,), is_owner=rank == 0)
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=0.1)
        self.state = State()
        topology = Topology.from_args(DistributedArgs(stage=3), RANKS, rank)
        self.checkpointer = Checkpointer(
            SaveArgs(save_path=folder, save_interval=1, keep_last=1, async_checkpointing=is_async),
            parameters=self.parameters,
            buffers={},
            optimizer=self.optimizer,
            stateful={},
            documents={"config.json": {}},
            topology=topology,
            shards=shards,
            point=point,
        )

    def step_to(self, step):
        """Be after a step, whatever was before."""
        self.state.step, self.state.tokens = step, 10 * step
        for name, parameter in self.parameters.items():
            parameter.data = value(name, step)[self.regions[name]].clone()
            moments = {
                key: value(f"{name}.{key}", step)[self.regions[name]].clone()
                for key in ("exp_avg", "exp_avg_sq")
            }
            self.optimizer.state[parameter] = {"step": torch.tensor(float(step)), **moments}

    def check_is_after(self, step):
        """Be after a step, in every value that is here."""
        assert (self.state.step, self.state.tokens) == (step, 10 * step)
        for name, parameter in self.parameters.items():
            assert torch.equal(parameter, value(name, step)[self.regions[name]]), name
            state = self.optimizer.state[parameter]
            assert float(state["step"]) == step
            for key in ("exp_avg", "exp_avg_sq"):
                found = value(f"{name}.{key}", step)[self.regions[name]]
                assert torch.equal(state[key], found), (name, key)


def save(folder, last, dying=None, deadly=None, is_async=False):
    """Save steps 1 to `last`; one rank dies at one point of the last save."""
    names, counter = [], count()

    def point(name):
        # Of the last save alone.
        if run.state.step == last:
            names.append(name)
            if distributed.get_rank() == dying and next(counter) == deadly:
                kill_this_process()

    run = Run(folder, point=point, is_async=is_async)
    for step in range(1, last + 1):
        if is_async:
            run.checkpointer.wait()
        run.step_to(step)
        run.checkpointer.save(run.state)
    run.checkpointer.wait()
    return names


def save_until_killed(*arguments):
    try:
        save(*arguments)
    except CheckpointError:
        os._exit(TYPED_ERROR)


def restore_all(folders):
    """Restore each and check every value; some save the next step; return the steps found."""
    found = []
    for number, folder in enumerate(folders):
        run = Run(folder)
        step = run.checkpointer.restore(run.state)
        if step is not None:
            run.check_is_after(step)
        found.append(step)
        if number % 4:
            continue
        run.step_to((step or 0) + 1)
        run.checkpointer.save(run.state)
        again = Run(folder)
        again.checkpointer.restore(again.state)
        again.check_is_after((step or 0) + 1)
    return found


@pytest.fixture(scope="module")
def points(fast_root):
    """Names of the points of a second save, which also removes the first one, by rank."""
    return run_distributed(save, RANKS, str(fast_root / "points-of-ranks"), 2)


def chosen(points, number):
    """So many (rank, place): those that decide, and others spread evenly over all ranks."""
    every = [(rank, place) for rank in range(RANKS) for place in range(len(points[rank]))]
    decide = ("await", "commit", "committed", "move", "pointer", "uncommit", "remove", "removed")
    first = [each for each in every if points[each[0]][each[1]].split()[0] in decide]
    rest = [each for each in every if each not in first]
    number -= len(first)
    assert 0 < number <= len(rest)
    return first + [rest[each * len(rest) // number] for each in range(number)]


def test_any_rank_may_be_killed_at_any_point(points, fast_path):
    # Twice as often in the foreground; in the background a thread dies with its process.
    plans = [(*each, False) for each in chosen(points, 70)]
    plans += [(*each, True) for each in chosen(points, KILLS - len(plans))]
    assert len(plans) == KILLS
    folders = [str(fast_path / str(number)) for number in range(KILLS)]
    calls = [(folder, 2, *plan) for folder, plan in zip(folders, plans, strict=True)]
    codes = run_groups_until_ended(save_until_killed, RANKS, calls)
    for (dying, place, _), code in zip(plans, codes, strict=True):
        name = points[dying][place]
        assert code[dying] == -signal.SIGKILL, name
        # The other one ends with the one typed error and does not hang.
        assert code[1 - dying] == TYPED_ERROR, (name, code)
    pointers = [Path(folder, "latest_checkpointed_iteration.json") for folder in folders]
    pointed = [json.loads(each.read_text())["latest_checkpointed_iteration"] for each in pointers]
    first, second = run_distributed(restore_all, RANKS, folders, timeout_seconds=240)
    assert first == second
    for (dying, place, _), step, pointer in zip(plans, first, pointed, strict=True):
        name = points[dying][place]
        committed = dying == 0 and place >= points[0].index("committed")
        assert step == (2 if committed else 1), name
        # It may be one behind, never ahead.
        assert pointer <= step, name
    # Before and after COMMIT, the pointer and the removal of an old checkpoint were met.
    names = {points[dying][place].split()[0] for dying, place, _ in plans}
    assert names >= {"make", "create", "write", "open", "await", "sync", "commit", "move", "remove"}
    assert set(first) == {1, 2}


def test_a_first_save_that_is_killed_leaves_a_fresh_start(points, fast_path):
    folders = [str(fast_path / str(dying)) for dying in range(RANKS)]
    places = (points[0].index("commit"), len(points[1]) - 1)
    calls = [(folders[dying], 1, dying, places[dying]) for dying in range(RANKS)]
    codes = run_groups_until_ended(save_until_killed, RANKS, calls)
    assert [codes[dying][dying] for dying in range(RANKS)] == [-signal.SIGKILL] * 2
    assert run_distributed(restore_all, RANKS, folders) == [[None, None]] * 2


def save_on_a_full_disk(folder, full, limit, is_async):
    """Save steps 1 and 2, the second with one rank's disk full; return the two errors, or none."""
    run = Run(folder, is_async=is_async)
    run.step_to(1)
    run.checkpointer.save(run.state)
    run.checkpointer.wait()
    distributed.barrier()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if distributed.get_rank() == full:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    run.step_to(2)
    messages = []
    try:
        run.checkpointer.save(run.state)
        run.checkpointer.wait()
    except CheckpointError as error:
        messages.append(str(error))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    # With room again the run goes on.
    run.step_to(3)
    run.checkpointer.save(run.state)
    run.checkpointer.wait()
    return messages


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize(("full", "limit"), [(0, 10), (1, 10)])
def test_a_full_disk_of_one_rank_is_an_error_of_both(full, limit, is_async, fast_path):
    folder = str(fast_path / "run")
    messages = run_distributed(save_on_a_full_disk, RANKS, folder, full, limit, is_async)
    for rank, (message,) in enumerate(messages):
        assert "the checkpoint of step 2 was not saved" in message
        assert "File too large" in message
        assert "earlier checkpoints are unchanged" in message
        assert (f"rank {full}: " in message) == (rank != full)
    assert checkpoint_steps(Path(folder)) == [3]
    newest_valid(Path(folder)).verify()


def fail_to_write(folder, failing, name):
    """Save steps 1 and 2, the second with an error of one rank's disk; return what each is told."""

    def point(reached):
        if run.state.step == 2 and distributed.get_rank() == failing and reached == name:
            raise OSError(28, "No space left on device")

    run = Run(folder, point=point)
    run.step_to(1)
    run.checkpointer.save(run.state)
    run.step_to(2)
    try:
        run.checkpointer.save(run.state)
    except CheckpointError as error:
        return str(error)
    return "no error"


def fail_everywhere(folder, plans):
    return [
        fail_to_write(f"{folder}/{number}", failing, name)
        for number, (failing, name) in enumerate(plans)
    ]


def test_a_disk_full_at_any_step_of_either_rank_keeps_the_old_checkpoint(points, fast_path):
    plans = [
        (rank, name)
        for rank in range(RANKS)
        for name in dict.fromkeys(points[rank])
        # Behind it the checkpoint is one; the pointer and what is removed are tested elsewhere.
        if name not in points[0][points[0].index("committed") :]
    ][::3]
    assert len(plans) > 10
    ranks = run_distributed(fail_everywhere, RANKS, str(fast_path), plans)
    for number, (failing, name) in enumerate(plans):
        for messages in ranks:
            assert "step 2 was not saved" in messages[number], (failing, name)
            assert "No space left on device" in messages[number], (failing, name)
        run = fast_path / str(number)
        assert checkpoint_steps(run) == [1], (failing, name)
        newest_valid(run).verify()
