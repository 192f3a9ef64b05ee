"""Runs of `lme train`: started with a limit in time, read from what they leave behind."""

import contextlib
import json
import multiprocessing
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lme_parallel.testing import run_until_ended

_PRELOADED = (
    "lme_cli.run",
    "lme_cli.loading",
    "lme_cli.planning",
    "lme_cli.compose",
    "lme_parallel.sharded",
    "lme_parallel.watchdog.watchdog",
    "torch._dynamo",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "lme_parallel.equality",
    "pytest",
)
_LEAST_SECONDS = 5.0


class OutOfTimeError(RuntimeError):
    """The budget does not allow what was asked for."""


@dataclass(frozen=True, slots=True)
class Budget:
    """Seconds until this script must have ended."""

    ends: float

    @classmethod
    def of(cls, seconds: float) -> "Budget":
        return cls(time.monotonic() + seconds)

    def left(self) -> float:
        """Seconds that are left; raises `OutOfTimeError` if that is as good as none."""
        left = self.ends - time.monotonic()
        if left < _LEAST_SECONDS:
            raise OutOfTimeError("out of time")
        return left


class RunFailedError(RuntimeError):
    """A run ended badly; carries the end of what it said."""


@dataclass(frozen=True, slots=True)
class Run:
    """A run that has ended."""

    records: list[dict[str, Any]]
    """Lines of `metrics.jsonl` about training, one a logged step."""
    log: str
    seconds: float
    """From its start to its end."""

    @property
    def losses(self) -> dict[int, float]:
        """By step."""
        return {each["step"]: each["loss"] for each in self.records}

    def numbers(self, warmup: int) -> dict[str, Any]:
        """Give what is kept of it: losses, and speed after `warmup` steps."""
        late = [each for each in self.records if each["step"] > warmup] or self.records[-1:]
        rates = [each["tokens_per_second"] for each in late]
        return {
            "losses": self.losses,
            "tokens_per_second": statistics.median(rates),
            "slowest": min(rates),
            "fastest": max(rates),
            "step_seconds": statistics.median(each["step_seconds"] for each in late),
            "mfu": late[-1]["mfu"],
            "peak_memory_bytes": max(each["peak_memory_bytes"] for each in self.records),
            "run_seconds": self.seconds,
        }


@dataclass(frozen=True, slots=True)
class Starter:
    """Starts runs: as the command does, or in processes that have loaded everything already."""

    is_forked: bool
    budget: Budget

    def prepare(self) -> None:
        """Load what processes to be forked need; at once, before the first of them."""
        if self.is_forked:
            multiprocessing.set_forkserver_preload(list(_PRELOADED))
            # Its time is not that of the first run.
            run_until_ended(nothing, 1)

    def train(self, content: dict[str, Any], processes: int) -> Run:
        """Train until the end.

        Args:
            content: The run file; a run that is in its folder goes on.
            processes: On this host.

        Raises:
            RunFailedError: With the end of its log.
            OutOfTimeError: If the budget ended before.
        """
        folder = Path(content["save_args"]["save_path"])
        folder.mkdir(parents=True, exist_ok=True)
        file, log = folder / "benchmark.yml", folder / "benchmark.log"
        file.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
        limit = self.budget.left()
        started = time.monotonic()
        is_well = (self._fork if self.is_forked else self._command)(file, log, processes, limit)
        seconds = time.monotonic() - started
        said = log.read_text(encoding="utf-8", errors="replace")
        if seconds >= limit:
            raise OutOfTimeError(f"ended after {seconds:.0f} s, with the time of this script")
        if not is_well:
            raise RunFailedError(last_words(said))
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        records = [each for each in map(json.loads, lines) if each["context"] == "train"]
        return Run(records, said, seconds)

    def _command(self, file: Path, log: Path, processes: int, limit: float) -> bool:
        command = [sys.executable, "-m", "lme_cli", "train", str(file)]
        if processes > 1:
            command += ["--nproc", str(processes)]
        with log.open("w", encoding="utf-8") as output:
            # A session of its own: at the limit its workers must end too.
            process = subprocess.Popen(
                command, stdout=output, stderr=output, env=_environment(), start_new_session=True
            )
            try:
                return process.wait(limit) == 0
            except subprocess.TimeoutExpired:
                process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(10)
                return False
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def _fork(self, file: Path, log: Path, processes: int, limit: float) -> bool:
        log.write_text("")
        codes = run_until_ended(
            train_here, processes, str(file), str(log), free_port(), timeout_seconds=limit
        )
        return all(code == 0 for code in codes)


def nothing() -> None:
    """Only start."""


def train_here(file: str, log: str, port: int) -> None:
    """Do in a forked process what one that `lme train --nproc` starts does."""
    from torch import distributed

    size, rank = 1, 0
    if distributed.is_initialized():
        size, rank = distributed.get_world_size(), distributed.get_rank()
        # The run makes its own.
        distributed.destroy_process_group()
    with Path(log).open("a", encoding="utf-8") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    # A file is not written line by line by itself.
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    if size > 1:
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(size),
            "LOCAL_WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
    from lme_cli.loading import load_run
    from lme_cli.run import train

    code = 0
    try:
        train(load_run(file))
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def last_words(log: str) -> str:
    """Return the last line that says what went wrong."""
    lines = [each.strip() for each in log.splitlines() if each.strip()]
    wrong = [each for each in lines if re.search(r"\berror\b|Error\b", each)]
    return (wrong or lines or ["it said nothing"])[-1]


def free_port() -> int:
    """Return a port that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONUNBUFFERED": "1"}
