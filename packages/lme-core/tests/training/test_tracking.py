import json
import sys
import types

import pytest

from lme_core.training.json_lines import JsonLines
from lme_core.training.tracking import (
    AimArgs,
    LoggingArgs,
    Trackers,
    WandBArgs,
    build_trackers,
)


def record(step, context="train", group=None, **values):
    return {"context": context, "group": group, "step": step, "tokens": step * 10, **values}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run" / "metrics.jsonl"


def write(path, *steps):
    lines = JsonLines(path)
    lines.start(0)
    for step in steps:
        lines.log(record(step, loss=1 / 3))
    lines.finish()


def steps(path):
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_lines_are_the_records_in_order(path):
    write(path, 1, 2, 3)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [record(step, loss=1 / 3) for step in (1, 2, 3)]


@pytest.mark.parametrize("restored", [0, 2, 3, 9])
def test_a_resumed_run_takes_back_later_lines_and_adds_none_twice(restored, path):
    write(path, 1, 2, 2, 3)
    lines = JsonLines(path)
    lines.start(restored)
    lines.log(record(restored + 1))
    lines.finish()
    assert steps(path) == [step for step in (1, 2, 2, 3) if step <= restored] + [restored + 1]


@pytest.mark.parametrize(
    "tail", ['{"context": "tra', '{"context": "train", "step": 2}', "\x00\x00\n", "[2]\n", "{}\n"]
)
def test_a_broken_last_line_is_removed(tail, path):
    write(path, 1)
    whole = path.read_text()
    path.write_text(whole + tail)
    lines = JsonLines(path)
    lines.start(5)
    assert path.read_text() == whole
    lines.log(record(6))
    lines.finish()
    assert steps(path) == [1, 6]


def test_a_line_is_on_disk_before_the_process_ends(path):
    lines = JsonLines(path)
    lines.start(0)
    lines.log(record(1))
    # No flush and no close: what a killed process leaves.
    assert steps(path) == [1]
    lines.flush()
    lines.finish()


def test_numbers_that_json_lacks_become_null(path):
    lines = JsonLines(path)
    lines.start(0)
    lines.log(record(1, loss=float("nan"), grad_norm=float("inf"), mfu=None))
    lines.finish()
    line = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert (line["loss"], line["grad_norm"], line["mfu"]) == (None, None, None)


def test_logging_before_the_start_is_an_error(path):
    with pytest.raises(RuntimeError, match="`start` must be called"):
        JsonLines(path).log(record(1))


class FakeRun:
    """Stands for a run of either service; it notes what it is told."""

    def __init__(self, settings):
        self.settings, self.calls, self.params = settings, [], {}
        self.id = settings.get("id") or "fresh-id"
        self.hash = settings.get("run_hash") or "fresh-hash"

    def __setitem__(self, key, value):
        self.params[key] = value

    def define_metric(self, *args, **settings):
        self.calls.append(("define_metric", args, settings))

    def log(self, values):
        self.calls.append(("log", values))

    def track(self, value, **settings):
        self.calls.append(("track", value, settings))

    def finish(self):
        self.calls.append("finish")

    def close(self):
        self.calls.append("close")


@pytest.fixture
def services(monkeypatch):
    """Stand-ins for the two packages; the runs that were opened, in order."""
    runs = []

    def open_run(**settings):
        runs.append(FakeRun(settings))
        return runs[-1]

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=open_run))
    monkeypatch.setitem(sys.modules, "aim", types.SimpleNamespace(Run=open_run))
    return runs


def test_wandb_gets_the_records_and_resumes_by_id(services, path):
    args = LoggingArgs(
        experiments_tracker_name="wandb",
        wandb_args=WandBArgs(project="p", name="n", entity="e", tags=["t"], group="g", notes="o"),
    )
    trackers = build_trackers(args, metrics_path=path, config={"seed": 1})
    trackers.start(0)
    trackers.log(record(3, loss=2.0, mfu=None))
    trackers.log(record(3, "val", "books", loss=1.0))
    state = json.loads(json.dumps(trackers.state_dict()))
    trackers.finish()
    (run,) = services
    assert run.settings == {
        "project": "p",
        "name": "n",
        "entity": "e",
        "tags": ["t"],
        "group": "g",
        "notes": "o",
        "config": {"seed": 1},
        "id": None,
        "resume": "allow",
    }
    assert ("define_metric", ("*",), {"step_metric": "iteration"}) in run.calls
    assert [call[1] for call in run.calls if call[0] == "log"] == [
        {"iteration": 3, "train/tokens": 30, "train/loss": 2.0},
        {"iteration": 3, "val/books/tokens": 30, "val/books/loss": 1.0},
    ]
    assert run.calls[-1] == "finish"
    assert steps(path) == [3, 3]

    resumed = build_trackers(args, metrics_path=path, config={})
    resumed.load_state_dict(state)
    resumed.start(3)
    assert services[1].settings["id"] == "fresh-id"
    resumed.finish()


def test_aim_gets_the_records_and_resumes_by_hash_in_its_repository(services, path):
    args = LoggingArgs(experiments_tracker_name="aim", aim_args=AimArgs(repo="r", experiment="e"))
    trackers = build_trackers(args, metrics_path=path, config={"seed": 1})
    trackers.start(0)
    trackers.log(record(3, "val", "books", loss=1.0))
    state = json.loads(json.dumps(trackers.state_dict()))
    trackers.finish()
    (run,) = services
    assert run.settings == {"run_hash": None, "repo": "r", "experiment": "e"}
    assert run.params == {"config": {"seed": 1}}
    context = {"subset": "val", "group": "books"}
    assert run.calls == [
        ("track", 30, {"name": "tokens", "step": 3, "context": context}),
        ("track", 1.0, {"name": "loss", "step": 3, "context": context}),
        "close",
    ]
    resumed = build_trackers(args, metrics_path=path, config={})
    resumed.load_state_dict(state)
    resumed.start(3)
    assert services[1].settings == {"run_hash": "fresh-hash", "repo": "r", "experiment": "e"}
    resumed.finish()


def test_other_trackers_get_the_same_records(path):
    other = JsonLines(path.parent / "other.jsonl")
    trackers = build_trackers(LoggingArgs(), metrics_path=path, config={}, others={"other": other})
    trackers.start(0)
    trackers.log(record(1))
    trackers.flush()
    trackers.finish()
    assert steps(path) == steps(path.parent / "other.jsonl") == [1]


def test_a_state_of_a_tracker_that_is_gone_is_left_aside(path):
    trackers = Trackers({"metrics": JsonLines(path)})
    trackers.load_state_dict({"wandb": {"run_id": "x"}, "metrics": {}})
    assert trackers.state_dict() == {"metrics": {}}
