"""The benchmark program runs on a CPU: every case, its numbers, its limits and its failures."""

import json
import subprocess
import time
from pathlib import Path

import pytest
import torch

from lme_kernels.bench import families, peers
from lme_kernels.bench.calls import Call, Case, Cost, Draw
from lme_kernels.bench.ceilings import Ceilings
from lme_kernels.bench.command import main
from lme_kernels.bench.first_call import measure_in_processes
from lme_kernels.bench.measure import Row, _attempt_graph, measure, relative_error, results_of
from lme_kernels.bench.presets import PRESETS
from lme_kernels.bench.report import line, shares
from lme_kernels.bench.stock import STOCK
from lme_kernels.bench.timing import OutOfTimeError, Stopwatch, Times, limit
from lme_kernels.bench.variants import build, variants_of
from lme_kernels.functional import ALL_OPS

CPU = torch.device("cpu")


def draw():
    return Draw(CPU, torch.float32)


def test_every_op_has_a_case_in_the_full_and_in_the_small_preset():
    for preset in ("full", "small"):
        assert set(ALL_OPS) <= {case.op for case in PRESETS[preset]}


@pytest.mark.parametrize(
    "case", [case for case in PRESETS["small"] if case.op in STOCK], ids=lambda each: each.name
)
def test_plain_torch_computes_what_the_op_does(case):
    run = {}
    for variant in ("torch", "eager"):
        watch = Stopwatch(CPU, 0.0)
        run[variant] = measure(
            case, variant, draw, watch, expected=run.get("results"), with_graph=True, seconds=None
        )
        if variant == "torch":
            run["results"] = results_of(*build(case, case.make(draw()), "torch"))
    assert run["eager"].faults == {}
    # Both round sums of float32 in another order.
    assert run["eager"].error < 5e-6
    assert run["eager"].times["forward"].repeats >= 5


def test_a_row_that_fails_says_why_and_a_slow_one_is_stopped():
    def broken(_):
        raise RuntimeError("no such luck\nsecond line")

    def endless(_):
        while True:
            time.sleep(0.01)

    watch = Stopwatch(CPU, 0.0)
    rows = [
        measure(
            Case("rmsnorm", "-", make), "torch", draw, watch,
            expected=None, with_graph=False, seconds=0.2,
        )
        for make in (broken, endless)
    ]  # fmt: skip
    assert rows[0].faults == {"run": "RuntimeError: no such luck"}
    assert "took more than" in rows[1].faults["run"]
    assert "no such luck" in line(rows[0], Ceilings(1.0, 1.0))


def test_the_limit_restores_what_was_there():
    with pytest.raises(OutOfTimeError), limit(0.05):
        time.sleep(1.0)
    with limit(None):
        time.sleep(0.06)


def test_the_error_is_the_largest_and_a_nan_is_not_lost():
    expected = ([torch.full((4,), 2.0)], [torch.ones(3)])
    ours = ([torch.full((4,), 2.2)], [torch.tensor([1.0, 1.0, 1.3])])
    assert relative_error(ours, expected) == pytest.approx(0.3 / 3**0.5)
    nan = ([torch.tensor([2.0, 2.0, 2.0, float("nan")])], ours[1])
    assert relative_error(nan, expected) != relative_error(nan, expected)


def test_shares_are_of_the_least_work_and_of_the_graph_if_there_is_one():
    row = Row("rmsnorm", "-", "triton", "bfloat16", Cost(100.0, 200.0, 0.0, 0.0))
    row.times["forward"] = Times(2.0, 2.0, 2.0, 5)
    row.times["both"] = Times(10.0, 10.0, 10.0, 5)
    row.times["graph both"] = Times(5.0, 5.0, 5.0, 5)
    rates = Ceilings(copy=100.0, matmul=1.0)
    assert shares(row, rates, of="bytes") == {"forward": 0.5, "both": 0.6}
    assert shares(row, rates, of="flops") == {}


def test_the_program_prints_a_row_a_variant_and_writes_them(tmp_path, capsys):
    path = tmp_path / "rows.json"
    options = ["--device", "cpu", "--preset", "small", "--seconds", "0", "--json", str(path)]
    ops = ["rmsnorm", "optim.adamw", "optim.grad_norm", "optim.clip_grad_norm"]
    assert main([*options, "--ops", *ops, "--variants", "torch", "eager", "ours"]) == 0
    out = capsys.readouterr().out
    content = json.loads(path.read_text())
    assert [row["variant"] for row in content["rows"]] == ["torch", "eager", *["ours"] * 3]
    assert all(row["faults"] == {} for row in content["rows"])
    assert content["rows"][1]["error"] < 1e-6
    assert "| rmsnorm | 16x64 | torch * |" in out
    assert content["rows"][0]["times"]["both"]["median"] > 0
    assert content["ceilings"]["copy"] > 0


def test_what_the_budget_leaves_out_is_said(capsys):
    options = ["--device", "cpu", "--preset", "small", "--seconds", "0", "--budget-seconds", "0"]
    assert main([*options, "--ops", "softmax", "--variants", "torch"]) == 0
    assert "left out, no time: softmax 16x64 torch" in capsys.readouterr().out


def test_an_op_that_is_not_there_is_refused():
    with pytest.raises(SystemExit, match="`--ops` has rmsnom"):
        main(["--device", "cpu", "--ops", "rmsnom"])


class Device:
    """Stands for a GPU: knows whether waiting is forbidden, and what was captured."""

    def __init__(self, monkeypatch):
        self.mode, self.modes, self.captured = 0, [], 0
        monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: self.mode)
        monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", self.set_mode)
        monkeypatch.setattr(Stopwatch, "_captured", self.capture)

    def set_mode(self, mode):
        self.mode = mode
        self.modes.append(mode)

    def capture(self, run):
        self.captured += 1
        return run

    def wait(self):
        if self.mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation")


def test_a_call_that_waits_for_the_device_is_not_captured(monkeypatch):
    device, watch = Device(monkeypatch), Stopwatch(CPU, 0.0)
    row = Row("rmsnorm", "-", "liger_kernel", "bfloat16")
    _attempt_graph(row, "both", device.wait, watch)
    assert row.faults == {"graph both": "not captured: it waits for the device"}
    assert (device.captured, device.mode) == (0, 0)
    _attempt_graph(row, "forward", lambda: None, watch)
    assert device.captured == 1
    assert "graph forward" in row.times
    assert device.modes == ["error", 0, "error", 0]


def test_after_a_capture_that_failed_there_is_no_other(monkeypatch):
    device, watch = Device(monkeypatch), Stopwatch(CPU, 0.0)

    def fails(run):
        raise ValueError("no")

    with monkeypatch.context() as patch:
        patch.setattr(watch, "_captured", fails)
        row = Row("rmsnorm", "-", "triton", "bfloat16")
        _attempt_graph(row, "forward", lambda: None, watch)
    assert row.faults == {"graph forward": "ValueError: no"}
    _attempt_graph(row, "both", lambda: None, watch)
    assert "a capture failed before (ValueError)" in row.faults["graph both"]
    assert device.captured == 0


def test_an_op_that_crashes_or_hangs_loses_no_other(tmp_path, monkeypatch, capsys):
    rows = tmp_path / "all.json"

    def run(command, *, check, timeout):
        op = command[command.index("--ops") + 1]
        path = Path(command[command.index("--json") + 1])
        assert timeout == pytest.approx(12.0 + families.GRACE)
        # What hangs has written the rows before.
        path.write_text(json.dumps({"facts": {}, "rows": [{"op": op}]}))
        if op == "softmax":
            raise subprocess.TimeoutExpired(command, timeout)
        return subprocess.CompletedProcess(command, -11 if op == "rmsnorm" else 0)

    monkeypatch.setattr(families.subprocess, "run", run)
    options = ["--device", "cpu", "--preset", "small", "--op-seconds", "12", "--json", str(rows)]
    assert main([*options, "--ops", "softmax", "rmsnorm", "swiglu"]) == 0
    content = json.loads(rows.read_text())
    assert {row["op"] for row in content["rows"]} == {"softmax", "rmsnorm", "swiglu"}
    assert sorted(content["lost"]) == ["rmsnorm: ended with code -11", "softmax: killed after 42 s"]
    assert "rmsnorm: ended with code -11" in capsys.readouterr().out


def test_no_op_is_begun_when_the_time_is_over(tmp_path):
    lost = families.measure_families(
        ["softmax"], [], seconds=5.0, left=lambda: 0.0, path=tmp_path / "rows.json"
    )
    assert lost == ["left out, no time: softmax"]


@pytest.mark.slow
def test_a_first_call_is_timed_in_a_process_of_its_own():
    index, case = next(
        (index, case) for index, case in enumerate(PRESETS["small"]) if case.op == "softmax"
    )
    pairs = [("small", index, case, "torch")]
    (first,) = measure_in_processes(pairs, ["--device", "cpu"], jobs=1, seconds=120.0)
    assert first.fault is None
    assert first.seconds > 0
    assert first.again_seconds < 1.0
    (late,) = measure_in_processes(pairs, ["--device", "cpu"], jobs=1, seconds=0.01)
    assert late.seconds is None
    assert "over 0 s" in late.fault


def test_other_libraries_are_measured_only_where_they_are(monkeypatch):
    assert "liger_kernel" not in variants_of(PRESETS["small"][0], CPU)
    monkeypatch.setattr(peers, "find_spec", lambda package: package)
    assert "liger_kernel" in variants_of(PRESETS["small"][0], CPU)


def test_arguments_are_drawn_the_same_each_time_and_leaves_share_their_memory():
    case = PRESETS["small"][0]
    first, second = case.make(draw()), case.make(draw())
    assert torch.equal(first.arguments[0], second.arguments[0])
    arguments, leaves = first.prepared()
    assert leaves[0].data_ptr() == first.arguments[0].data_ptr()
    assert not first.arguments[0].requires_grad
    kept = Call((torch.ones(2), torch.ones(2)), Cost(0, 0), constants=frozenset({1}))
    assert len(kept.prepared()[1]) == 1
    assert len(arguments) == 2
