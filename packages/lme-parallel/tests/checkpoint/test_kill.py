"""A process killed at any step of a save continues from a committed checkpoint."""

import json
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import pytest
import torch

from lme_parallel.args import DistributedArgs
from lme_parallel.checkpoint.args import SaveArgs
from lme_parallel.checkpoint.checkpointer import Checkpointer
from lme_parallel.checkpoint.layout import checkpoint_steps
from lme_parallel.checkpoint.reader import newest_valid
from lme_parallel.testing import kill_this_process, run_killed
from lme_parallel.topology import Topology

STEPS = 3


@dataclass
class State:
    step: int = 0
    tokens: int = 0


def train(folder, *, is_async=False, point=None, width=2):
    """Train a matrix to the last step, from wherever the folder says; return its bits."""
    weight = torch.nn.Parameter(torch.linspace(-1, 1, 3 * width).view(width, 3))
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    checkpointer = Checkpointer(
        SaveArgs(save_path=str(folder), save_interval=1, keep_last=1, async_checkpointing=is_async),
        parameters={"weight": weight},
        buffers={},
        optimizer=optimizer,
        stateful={},
        documents={"config.json": {"width": width}},
        topology=Topology.from_args(DistributedArgs(), 1, 0),
        point=point,
    )
    state = State()
    restored = checkpointer.restore(state)
    while state.step < STEPS:
        optimizer.zero_grad()
        (weight * (state.step + 1)).sin().sum().backward()
        optimizer.step()
        state.step += 1
        checkpointer.save(state)
        if is_async:
            # Something to overlap with, and a place for the failure of a killed thread.
            checkpointer.check()
    checkpointer.wait()
    moments = [optimizer.state[weight][name] for name in ("step", "exp_avg", "exp_avg_sq")]
    return restored, [weight.detach(), *moments]


def train_until(folder, deadly, is_async):
    counter = count()

    def point(name):
        if next(counter) == deadly:
            kill_this_process()

    train(folder, is_async=is_async, point=point)


def train_slowly(folder):
    # 6 MB: tensorstore's own writes take long enough to be hit.
    train(folder, width=500_000)


def names_of_points(folder):
    names = []
    train(folder, point=names.append)
    return names


def assert_resumes(folder, straight):
    before = newest_valid(Path(folder))
    pointer = Path(folder) / "latest_checkpointed_iteration.json"
    if pointer.exists():
        # The pointer may be one behind, never ahead.
        assert before is not None
        assert json.loads(pointer.read_text())["latest_checkpointed_iteration"] <= before.step
    restored, tensors = train(folder)
    assert restored == (None if before is None else before.step)
    for left, right in zip(tensors, straight, strict=True):
        assert torch.equal(left, right)
    assert checkpoint_steps(Path(folder)) == [STEPS]
    assert newest_valid(Path(folder)).step == STEPS
    return restored


@pytest.fixture(scope="module")
def straight(fast_root):
    return train(fast_root / "straight")[1]


@pytest.fixture(scope="module")
def points(fast_root):
    return names_of_points(fast_root / "points")


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_a_run_killed_at_any_numbered_point_continues_from_a_committed_step(
    is_async, fast_path, points, straight
):
    starts = [index for index, name in enumerate(points) if name == "make run directory"]
    assert len(starts) == STEPS
    # Each point of the second save, which also removes the first one. Asynchronous saves go
    # through the same points on another thread: every second of them.
    deadly = range(starts[1], starts[2], 2 if is_async else 1)
    assert len(deadly) >= (25 if is_async else 50)
    resumed = set()
    for each in deadly:
        folder = fast_path / str(each)
        assert run_killed(train_until, str(folder), each, is_async), points[each]
        resumed.add(assert_resumes(folder, straight))
    # Before and after COMMIT: both kinds were there.
    assert resumed == {1, 2}


def test_a_run_killed_in_its_first_save_starts_fresh(fast_path, points, straight):
    committed = points.index("committed")
    for each in (0, committed // 3, committed // 2, committed - 1):
        folder = fast_path / str(each)
        assert run_killed(train_until, str(folder), each, False)
        assert assert_resumes(folder, straight) is None


@pytest.mark.parametrize("milliseconds", range(20, 220, 20))
def test_a_run_killed_at_any_time_continues_from_a_committed_step(milliseconds, fast_path):
    run_killed(train_slowly, str(fast_path), after_seconds=milliseconds / 1000)
    before = newest_valid(fast_path)
    restored, tensors = train(fast_path, width=500_000)
    assert restored == (None if before is None else before.step)
    expected = train(fast_path / "straight", width=500_000)[1]
    for left, right in zip(tensors, expected, strict=True):
        assert torch.equal(left, right)


def test_numbered_points_cover_each_step_of_a_save(points):
    expected = ("make", "create", "write", "open", "await", "sync", "commit", "move", "remove")
    assert {name.split()[0] for name in points} >= set(expected)
