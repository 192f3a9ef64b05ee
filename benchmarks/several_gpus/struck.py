"""A whole run of `lme train --nproc 2` of which one process is stopped or killed from outside."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from several_gpus.bench import Bench
from several_gpus.layouts import LAYOUTS
from several_gpus.runs import OutOfTimeError, last_words

BLOWS = {"stopped": signal.SIGSTOP, "killed": signal.SIGKILL}
PART = "struck"
TITLES = ("layout", "process 1 was", "named", "s until all ended", "exit code", "what the run said")
_WATCHDOG_SECONDS = 10.0
_POLL = 0.2


def measure_struck(bench: Bench, layouts: list[str]) -> None:
    """Strike process 1 of a run in each layout, and keep what the run said.

    Args:
        bench: What is run.
        layouts: Of two processes.
    """
    for layout in layouts:
        for blow in BLOWS:
            bench.attempt(PART, f"{layout}, {blow}", _struck(bench, layout, blow))


def _struck(bench: Bench, layout: str, blow: str) -> Callable[[], dict[str, Any]]:
    def make() -> dict[str, Any]:
        folder = bench.folder / bench.case.name / PART / f"{layout}-{blow}"
        content = bench.content(folder, layout)
        # It must not end before.
        content["training_parameters"]["num_training_steps"] = 10**6
        content["save_args"]["save_interval"] = 10**6
        content["distributed_args"]["watchdog_seconds"] = _WATCHDOG_SECONDS
        folder.mkdir(parents=True)
        file = folder / "benchmark.yml"
        file.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
        print(f"{bench.case.name}: {PART}, {folder.name} ...", flush=True)
        result = _strike(bench, file, folder, BLOWS[blow])
        shutil.rmtree(folder)
        return {"layout": layout, "blow": blow, **result}

    return make


def _strike(bench: Bench, file: Path, folder: Path, number: signal.Signals) -> dict[str, Any]:
    command = [sys.executable, "-m", "lme_cli", "train", str(file), "--nproc", "2"]
    log, metrics = folder / "benchmark.log", folder / "metrics.jsonl"
    with log.open("w", encoding="utf-8") as output:
        run = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
        try:
            while not (metrics.exists() and metrics.read_text().count("\n") >= 3):
                if run.poll() is not None:
                    return {"failed": last_words(log.read_text())}
                bench.budget.left()
                time.sleep(_POLL)
            os.kill(_worker(run.pid, rank=1), number)
            started = time.monotonic()
            code = run.wait(min(bench.budget.left(), 120.0))
        except subprocess.TimeoutExpired:
            return {"failed": "the run was still there when the time was up"}
        finally:
            if run.poll() is None:
                # It takes its processes along.
                run.kill()
                run.wait()
    seconds = time.monotonic() - started
    said = last_words(log.read_text())
    return {"seconds": seconds, "code": code, "said": said}


def _worker(launcher: int, *, rank: int) -> int:
    """Find a process that a launcher started, by its rank."""
    for each in Path("/proc").glob("[0-9]*"):
        try:
            parent = (each / "stat").read_text().rpartition(")")[2].split()[1]
            variables = (each / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if int(parent) == launcher and f"RANK={rank}".encode() in variables:
            return int(each.name)
    raise OutOfTimeError(f"process {rank} of the run is gone already")


def struck_rows(results: dict[str, Any]) -> list[list[str]]:
    """Return the rows of a table of the part."""
    rows = []
    for each in results.values():
        if "failed" in each:
            rows.append([f"failed: {each['failed'][:160]}"])
            continue
        named = re.search(
            r"\brank 1\b[^;]*(stopped by a signal|ended without a word|exit code)", each["said"]
        )
        title = LAYOUTS[each["layout"]].title
        numbers = [f"{each['seconds']:.1f}", str(each["code"])]
        rows.append([title, each["blow"], "yes" if named else "NO", *numbers, each["said"]])
    return rows
