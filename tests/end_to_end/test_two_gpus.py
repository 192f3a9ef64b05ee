"""The comparison of two GPUs with one runs on two processes of a CPU as well."""

import importlib
import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    # What the script sets itself is set back.
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return importlib.import_module


@pytest.mark.slow
def test_layouts_and_moved_runs_are_compared_with_one_process(scripts, monkeypatch, tmp_path):
    words = "--tiny --device cpu --dtype fp32 --steps 4 --resume-steps 4 --parts layouts resume"
    chosen = "--layouts one-half-batches fsdp2 tp --ways two-one"
    where = ["--folder", str(tmp_path), "--output", str(tmp_path / "output")]
    monkeypatch.setattr(sys, "argv", ["two_gpus.py", *words.split(), *chosen.split(), *where])
    scripts("two_gpus").main()
    found = json.loads((tmp_path / "output/results.json").read_text())["tiny"]
    layouts = found["layouts"]
    assert layouts.keys() == {"one", "one-half-batches", "fsdp2", "tp"}
    losses = {name: list(each["losses"].values()) for name, each in layouts.items()}
    # The language is learned: from all words alike to what mostly follows.
    assert losses["one"][-1] < losses["one"][0] - 0.1
    for each in losses.values():
        # fp32 over four steps, summed in another order.
        assert each == pytest.approx(losses["one"], rel=2e-6)
    assert all(each["tokens_per_second"] > 0 for each in layouts.values())
    moved = found["resume"]["two-one"]
    assert list(moved["after"].values()) == pytest.approx(losses["one"][2:], rel=2e-6)
    assert moved["bytes"] > 0
    text = (tmp_path / "output/results.md").read_text()
    (row,) = [line for line in text.splitlines() if line.startswith("| TP, sequence parallel |")]
    assert row.endswith("| yes |")


def test_noise_decides_what_is_equal(scripts):
    equality = scripts("several_gpus.equality")
    numbers = {
        "tokens_per_second": 1.0,
        "slowest": 1.0,
        "fastest": 1.0,
        "mfu": None,
        "peak_memory_bytes": 1,
    }
    results = {
        "one": {**numbers, "losses": {"1": 4.0, "2": 2.0}},
        "one-half-batches": {**numbers, "losses": {"1": 4.0, "2": 2.002}},
        "fsdp2": {**numbers, "losses": {"1": 4.0, "2": 1.9981}},
        "tp": {**numbers, "losses": {"1": 4.01, "2": 2.0}},
        "cp-ring": {**numbers, "losses": {"1": 4.0, "2": float("nan")}},
    }
    assert equality.bound(results) == pytest.approx(2e-3)
    rows = {row[0]: row for row in equality.layout_rows(results)}
    assert rows["FSDP2"][-4:] == ["0.0e+00", "9.5e-04", "2", "yes"]
    assert rows["TP, sequence parallel"][-4:] == ["2.5e-03", "2.5e-03", "1", "NO"]
    assert rows["CP, ring"][-3:] == ["inf", "2", "NO"]


def test_a_trace_says_what_the_time_went_to(scripts):
    # Compute from 0 to 40 and 60 to 80, communication from 30 to 70, then nothing until a copy.
    spans = {"gemm": (0, 40), "ncclDevKernel_AllGather": (30, 40), "other": (60, 20)}
    events = [
        {"cat": "kernel", "name": name, "ts": start, "dur": length}
        for name, (start, length) in spans.items()
    ]
    events += [
        {"cat": "gpu_memcpy", "name": "Memcpy HtoD", "ts": 95, "dur": 5},
        {"cat": "cpu_op", "name": "aten::mm", "ts": 0, "dur": 1000},
    ]
    summarise = scripts("several_gpus.trace").summarise
    found = summarise(events)
    assert found["milliseconds"] == pytest.approx(0.1)
    shares = {name: found[name] for name in ("compute", "communication", "idle")}
    assert shares == pytest.approx({"compute": 0.65, "communication": 0.4, "idle": 0.15})
    assert found["communication hidden"] == pytest.approx(0.2)
    assert found["communication alone"] == pytest.approx(0.2)
    assert summarise(events[-1:]) is None


@pytest.mark.parametrize(
    ("sentence", "ranks"),
    [
        ("rank 1 has been in forward at a.py:3 for 9 s; rank 0 waits in all_reduce", [1]),
        ("rank 0 (process 7 on a) has ended without a word; rank 1 lost the connection in x", [0]),
        ("rank 0 called all_reduce of 8 at a; rank 1 called all_reduce of 1 at b", [0, 1]),
        ("no rank is ahead of the others: rank 0 waits in all_reduce", []),
        ("rank 1 failed in data at a.py:1: ValueError; rank 0 is in optimizer", [1]),
    ],
)
def test_those_who_are_blamed_are_told_from_those_who_wait(scripts, sentence, ranks):
    assert scripts("several_gpus.hang").culprits(sentence) == ranks


def test_the_same_blame_in_other_places_is_the_same(scripts):
    general = scripts("several_gpus.hang").general
    gone = "rank {} (process {} on a) has ended without a word, last seen in {} at {}; rank 0 waits in x"
    first, second = gone.format(1, 7, "start", "a.py:3"), gone.format(1, 88, "backward", "b.py:4")
    assert general(first) == general(second) != general(gone.format(0, 7, "start", "a.py:3"))
    slow = "rank 1 has been in forward at {} for {} s; rank 0 waits in all_reduce"
    assert general(slow.format("a.py:3", 1)) == general(slow.format("a.py:3", 12))
    assert general(slow.format("a.py:3", 1)) != general(first)
