import gc
import json
import logging
import os
import signal
import sys
import time
import types

import pytest
import torch

from lme_core.training.evaluation import EvaluationSet
from lme_core.training.hooks import (
    EvaluateHook,
    GarbageCollectionHook,
    LogHook,
    ProfileHook,
    SaveHook,
    StopHook,
)
from lme_core.training.objectives import NextToken
from lme_core.training.runtime import SingleDevice
from lme_core.training.throughput import Throughput
from lme_core.training.trainer import StepReport, TrainState


class Recorder:
    """A tracker and a saver that note what they are told, in one list."""

    def __init__(self):
        self.events = []

    def log(self, record):
        self.events.append(record)

    def flush(self):
        self.events.append("flush")

    def save(self, state):
        self.events.append(("save", state.step))

    def wait(self):
        self.events.append("wait")


def report(*, last=False, loss=2.5, **changes):
    settings = {
        "loss": torch.tensor(loss),
        "values": {"lm_loss": torch.tensor(2.0), "aux_loss": torch.tensor(1.0)},
        "targets": torch.tensor(10),
        "grad_norm": torch.tensor(0.5),
        "learning_rate": 1e-3,
        "tokens": 12,
        "started": time.perf_counter(),
        "data_wait_seconds": 0.25,
        "is_last": last,
    }
    return StepReport(**{**settings, **changes})


@pytest.fixture
def runtime(tiny_model):
    return SingleDevice(tiny_model())


@pytest.fixture
def recorder():
    return Recorder()


def test_a_line_of_training_has_the_documented_fields(runtime, recorder):
    throughput = Throughput(num_devices=2, flops_per_token=3e9, device_peak_flops=1e15)
    hook = LogHook(runtime, recorder, throughput, interval=10)
    hook(TrainState(step=10, tokens=120), report(started=time.perf_counter() - 2.0))
    (line,) = recorder.events
    assert list(line) == [
        "context",
        "group",
        "step",
        "tokens",
        "loss",
        "lm_loss",
        "aux_loss",
        "grad_norm",
        "learning_rate",
        "tokens_per_second",
        "tflops_per_device",
        "mfu",
        "step_seconds",
        "data_wait_seconds",
        "peak_memory_bytes",
    ]
    assert (line["context"], line["group"], line["step"], line["tokens"]) == (
        "train",
        None,
        10,
        120,
    )
    assert (line["loss"], line["lm_loss"], line["grad_norm"]) == (2.5, 2.0, 0.5)
    # 12 tokens in about 2 seconds on two devices.
    assert line["step_seconds"] == pytest.approx(2.0, rel=0.05)
    assert line["tokens_per_second"] == pytest.approx(6.0, rel=0.05)
    assert line["tflops_per_device"] == pytest.approx(6 * 3e9 / 2 / 1e12, rel=0.05)
    assert line["mfu"] == pytest.approx(6 * 3e9 / 2 / 1e15, rel=0.05)
    # A process with torch in it takes more than 50 MB and, here, less than 64 GB.
    assert 5e7 < line["peak_memory_bytes"] < 6.4e10


def test_lines_come_at_the_first_step_every_interval_and_the_last(runtime, recorder):
    hook = LogHook(runtime, recorder, Throughput(), interval=4)
    for step in range(1, 11):
        hook(TrainState(step=step), report(last=step == 10))
    assert [line["step"] for line in recorder.events] == [1, 4, 8, 10]


def test_a_step_without_a_line_is_not_waited_for(runtime, recorder):
    class Untouchable:
        def float(self):
            raise AssertionError("the step was read")

    hook = LogHook(runtime, recorder, Throughput(), interval=4)
    hook(TrainState(step=3), report(loss=0.0, grad_norm=Untouchable()))
    assert recorder.events == []


def test_rates_count_training_alone():
    throughput = Throughput()
    throughput.add(report(started=time.perf_counter() - 1.0))
    # Time between steps, as evaluation takes it, is not counted.
    time.sleep(0.05)
    throughput.add(report(started=time.perf_counter() - 3.0))
    reading = throughput.read()
    assert reading["step_seconds"] == pytest.approx(2.0, rel=0.01)
    assert reading["tokens_per_second"] == pytest.approx(24 / 4, rel=0.01)
    assert reading["data_wait_seconds"] == 0.25
    assert (reading["tflops_per_device"], reading["mfu"]) == (None, None)
    assert "cost_usd" not in reading


def test_money_spent_goes_on_in_a_resumed_run():
    first = Throughput(num_devices=8, cost_per_accelerator_per_hour=3600.0)
    time.sleep(0.05)
    spent = json.loads(json.dumps(first.state_dict()))
    # 8 dollars a second.
    assert 0.4 < spent["cost_usd"] < 8
    second = Throughput(num_devices=8, cost_per_accelerator_per_hour=3600.0)
    second.load_state_dict(spent)
    assert second.read()["cost_usd"] > spent["cost_usd"]


def test_evaluation_comes_every_interval_and_at_the_end(runtime, recorder, counting_loader):
    batches = [next(counting_loader(ragged=True))]
    sets = [
        EvaluationSet(context="val", group="one", batches=batches),
        EvaluationSet(context="val", group="two", batches=batches, bytes_per_target=4.0),
        EvaluationSet(context="test", batches=batches),
    ]
    hook = EvaluateHook(runtime, NextToken(), recorder, sets, interval=3)
    for step in range(1, 8):
        hook(TrainState(step=step, tokens=step * 12), report(last=step == 7))
    seen = [(line["context"], line["group"], line["step"]) for line in recorder.events]
    assert seen == [
        *[("val", group, step) for step in (3, 6, 7) for group in ("one", "two")],
        ("test", None, 7),
    ]
    sums = runtime.forward(NextToken(), batches[0])
    mean = (sums.total / sums.targets).item()
    assert recorder.events[0] == {
        "context": "val",
        "group": "one",
        "step": 3,
        "tokens": 36,
        "loss": pytest.approx(mean, rel=1e-6),
    }
    # 4 bytes a token: nats to bits, per byte.
    assert recorder.events[1]["bits_per_byte"] == pytest.approx(mean / 0.6931472 / 4, rel=1e-6)


def test_evaluation_weighs_targets_and_not_batches(runtime, recorder, counting_loader):
    loader = counting_loader(ragged=True)
    batches = [next(loader) for _ in range(4)]
    hook = EvaluateHook(
        runtime,
        NextToken(),
        recorder,
        [EvaluationSet(context="val", batches=batches)],
        interval=None,
    )
    hook(TrainState(step=1), report())
    assert recorder.events == []
    hook(TrainState(step=2), report(last=True))
    sums = [runtime.forward(NextToken(), batch) for batch in batches]
    assert len({s.targets.item() for s in sums}) > 1
    total = sum(s.total.item() for s in sums) / sum(s.targets.item() for s in sums)
    assert recorder.events[0]["loss"] == pytest.approx(total, rel=1e-6)


def test_an_empty_evaluation_set_is_an_error(runtime, recorder):
    sets = [EvaluationSet(context="val", group="nothing", batches=[])]
    hook = EvaluateHook(runtime, NextToken(), recorder, sets, interval=1)
    with pytest.raises(ValueError, match="val split of `nothing` has no batches"):
        hook(TrainState(step=1), report())


def test_saves_come_every_interval_and_wait_at_the_end(recorder):
    hook = SaveHook(recorder, recorder, interval=3)
    for step in range(1, 9):
        hook(TrainState(step=step), report(last=step == 8))
    assert recorder.events == [
        "flush",
        ("save", 3),
        "flush",
        ("save", 6),
        "flush",
        ("save", 8),
        "wait",
    ]


def test_a_run_that_stops_saves_once_and_waits(recorder):
    hook = SaveHook(recorder, recorder, interval=3)
    hook(TrainState(step=3, stop_reason="enough"), report())
    assert recorder.events == ["flush", ("save", 3), "wait"]


def test_a_kill_switch_stops_the_run(runtime, tmp_path):
    hook = StopHook(runtime, kill_switch=tmp_path / "KILLSWITCH", signals=())
    state = TrainState(step=1)
    hook(state, report())
    assert state.stop_reason is None
    (tmp_path / "KILLSWITCH").touch()
    hook(state, report())
    assert "KILLSWITCH exists (remove it" in state.stop_reason


def test_a_budget_stops_the_run(runtime):
    hook = StopHook(runtime, stop_after_seconds=0.05, signals=())
    state = TrainState(step=1)
    hook(state, report())
    assert state.stop_reason is None
    time.sleep(0.06)
    hook(state, report())
    assert "`training_parameters.stop_after_seconds` is 0.05" in state.stop_reason


def test_a_signal_stops_the_run_once_and_the_next_acts_as_before(runtime):
    heard = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    try:
        hook = StopHook(runtime, repeat_seconds=0.0)
        os.kill(os.getpid(), signal.SIGTERM)
        state = TrainState(step=1)
        hook(state, report())
        assert (state.stop_reason, heard) == ("a signal asked for it", [])
        os.kill(os.getpid(), signal.SIGTERM)
        assert heard == [signal.SIGTERM]
        hook.close()
        os.kill(os.getpid(), signal.SIGTERM)
        assert heard == [signal.SIGTERM] * 2
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_signal_that_comes_twice_at_once_is_one_request(runtime):
    heard = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    try:
        hook = StopHook(runtime, repeat_seconds=60.0)
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
        state = TrainState(step=1)
        hook(state, report())
        hook.close()
        assert (state.stop_reason, heard) == ("a signal asked for it", [])
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_replica_that_heard_nothing_stops_with_the_others(runtime):
    class Other(SingleDevice):
        def reduce(self, tensor, op):
            assert op == "max"
            assert tensor.device.type == "cpu"
            return torch.maximum(tensor, torch.tensor([0.0, 1.0, 0.0]))

    runtime.__class__ = Other
    hook = StopHook(runtime, signals=())
    state = TrainState(step=1)
    hook(state, report())
    assert "exists" in state.stop_reason


@pytest.fixture
def without_inductor(monkeypatch):
    """The profiler asks Inductor whether it captures graphs, and importing it takes seconds."""
    if "torch._inductor" not in sys.modules:
        config = types.SimpleNamespace(triton=types.SimpleNamespace(cudagraphs=False))
        package = types.SimpleNamespace(config=config)
        monkeypatch.setitem(sys.modules, "torch._inductor", package)
        monkeypatch.setitem(sys.modules, "torch._inductor.config", config)
        monkeypatch.setattr(torch, "_inductor", package, raising=False)


def test_a_trace_of_one_step_is_written(tmp_path, without_inductor):
    hook = ProfileHook(tmp_path, wait=1, warmup=1, active=1)
    for step in range(1, 6):
        torch.ones(8, 8) @ torch.ones(8, 8)
        hook(TrainState(step=step), report())
    hook.close()
    (trace,) = tmp_path.iterdir()
    names = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert "aten::mm" in names


def test_garbage_is_collected_at_fixed_steps_only(monkeypatch):
    collected = []
    assert gc.isenabled()
    hook = GarbageCollectionHook(interval=3)
    monkeypatch.setattr(gc, "collect", lambda: collected.append(state.step))
    try:
        assert not gc.isenabled()
        for step in range(1, 8):
            state = TrainState(step=step)
            hook(state, report())
        assert collected == [3, 6]
    finally:
        hook.close()
    assert gc.isenabled()


def test_what_was_done_is_said(runtime, recorder, caplog):
    hook = LogHook(runtime, recorder, Throughput(), interval=1)
    with caplog.at_level(logging.INFO, "lme_core"):
        hook(TrainState(step=1, tokens=12), report())
    assert "step done: step=1 tokens=12 loss=2.5000 grad_norm=0.5000" in caplog.text


def test_a_skipped_update_is_said(runtime, recorder, caplog):
    hook = LogHook(runtime, recorder, Throughput(), interval=1)
    hook(TrainState(step=1), report(grad_norm=torch.tensor(float("inf"))))
    assert "update skipped, gradient norm not finite: step=1" in caplog.text
