"""A run that met a bad step goes back to its checkpoint and past the data that led there."""

import json
import math

import pytest
import torch

from lme_core.training.anomalies import StepGuard
from lme_core.training.hooks import GuardHook
from lme_core.training.json_lines import JsonLines
from lme_core.training.rewinding import Rewinder
from lme_core.training.tracking import Trackers
from lme_core.training.trainer import StepReport, TrainState


class Saver:
    """Remembers what was asked of it, and restores step 4."""

    def __init__(self):
        self.calls = []

    def rewind(self, state, keep):
        self.calls.append((state.step, sorted(keep)))
        state.step, state.tokens = 4, 400


class Batches:
    position = None

    def load_state_dict(self, state):
        self.position = state


def report(*, is_last=False):
    zero = torch.zeros(())
    return StepReport(
        loss=zero,
        values={},
        targets=zero,
        grad_norm=zero,
        learning_rate=0.0,
        tokens=0,
        started=0.0,
        data_wait_seconds=0.0,
        is_last=is_last,
    )


@pytest.fixture
def parts(tmp_path):
    """A guard with a bad step 6, what goes back, and the lines of seven steps."""
    lines = JsonLines(tmp_path / "metrics.jsonl")
    trackers = Trackers({"metrics": lines, "other": object()})
    lines.start(0)
    guard = StepGuard(
        policy="rewind",
        spike_sigmas=None,
        record_path=tmp_path / "bad.jsonl",
        device=torch.device("cpu"),
    )
    for step in range(1, 8):
        lines.log({"context": "train", "group": None, "step": step})
        loss = torch.tensor(math.nan if step == 6 else 1.0)
        batch = [{"input_ids": torch.zeros(1, 2)}]
        guard.judge(step, loss, torch.ones(()), batch, {"at": step - 1}, {"at": step})
    saver, batches, phases = Saver(), Batches(), []
    rewinder = Rewinder(saver, batches, trackers, guard, keep=("loader",), mark=phases.append)
    yield guard, rewinder, saver, batches, phases, lines
    lines.finish()


def test_everything_goes_back_but_the_data(parts, tmp_path):
    guard, rewinder, saver, batches, phases, lines = parts
    state = TrainState(step=7, tokens=700, stop_reason="asked to")
    GuardHook(guard, interval=7, rewinder=rewinder)(state, report())
    assert saver.calls == [(7, ["loader"])]
    assert (state.step, state.tokens, state.stop_reason) == (4, 400, "asked to")
    assert batches.position == {"at": 6}
    assert phases == ["checkpoint"]
    lines.log({"context": "train", "group": None, "step": 5})
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    last = json.loads((tmp_path / "bad.jsonl").read_text().splitlines()[-1])
    assert (last["rewound_from"], last["rewound_to"]) == (7, 4)


@pytest.mark.parametrize(
    ("intervals", "step", "is_last", "looks"),
    [
        ((10, None), 7, False, False),
        ((10, 7), 7, False, True),
        ((7, None), 7, False, True),
        ((10, None), 7, True, True),
        ((10, None), 1, False, True),
    ],
)
def test_the_guard_is_asked_before_each_save(parts, intervals, step, is_last, looks):
    guard, rewinder, saver, *_ = parts
    hook = GuardHook(guard, interval=intervals[0], save_interval=intervals[1], rewinder=rewinder)
    hook(TrainState(step=step), report(is_last=is_last))
    assert bool(saver.calls) == looks
