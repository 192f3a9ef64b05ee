"""Starts the processes of one host, shows what they say, and ends them all when one fails."""

import os
import queue
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

from lme_parallel.failures import ERROR_FILE_VARIABLE, LAUNCHER_VARIABLE, read_failure

if TYPE_CHECKING:
    # Loads torch, which this module does without.
    from lme_parallel.launch import Launch

GRACE_SECONDS = 5.0
"""Between asking processes to end and killing them."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a run of several processes ended badly."""

    rank: int
    """Of the process that failed first."""
    exit_code: int
    """Its exit code; negative: the signal that ended it."""
    message: str
    """What it said; empty if it could not say anything."""


def worker_environments(
    nproc: int, host: "Launch", environment: Mapping[str, str]
) -> list[dict[str, str]]:
    """Return the variables of each process of this host.

    Args:
        nproc: Processes on each host.
        host: This launcher among those of other hosts, one each; alone: one of one.
        environment: Variables to start from.

    Raises:
        ValueError: If there are several hosts and the address of the first is not known.
    """
    if host.world_size > 1 and host.address is None:
        raise ValueError(
            f"`MASTER_ADDR` is not set, so the {host.world_size} hosts cannot find each other; set"
            " it to the first host"
        )
    threads = max(1, (os.cpu_count() or 1) // nproc)
    shared = {
        **environment,
        "WORLD_SIZE": str(nproc * host.world_size),
        "LOCAL_WORLD_SIZE": str(nproc),
        "MASTER_ADDR": host.address or "127.0.0.1",
        "MASTER_PORT": str(host.port if host.world_size > 1 else _free_port()),
        # More threads than cores make every process slower.
        "OMP_NUM_THREADS": environment.get("OMP_NUM_THREADS", str(threads)),
        "PYTHONUNBUFFERED": "1",
        LAUNCHER_VARIABLE: str(os.getpid()),
    }
    shared.pop("TORCHELASTIC_USE_AGENT_STORE", None)
    return [
        {**shared, "RANK": str(host.rank * nproc + local), "LOCAL_RANK": str(local)}
        for local in range(nproc)
    ]


def run_workers(
    command: Sequence[str], environments: Sequence[Mapping[str, str]]
) -> Failure | None:
    """Run one command in several processes until all ended.

    Each line that they write is marked with the rank; that of rank 0 is not where it goes to a
    terminal. Interrupts and requests to end are passed on. When one fails, the others are ended.

    Args:
        command: Program and arguments.
        environments: Variables of each process, `RANK` among them.

    Returns:
        What failed first; `None` if all went well.
    """
    with tempfile.TemporaryDirectory(prefix="lme-launch-") as folder:
        group = _Group()
        # Before the first process starts: it may be asked to end at once.
        previous = {each: signal.signal(each, group.pass_on) for each in _passed_on()}
        try:
            for number, each in enumerate(environments):
                error_file = f"{folder}/{number}.json"
                group.add(_Worker(command, {**each, ERROR_FILE_VARIABLE: error_file}))
            return group.wait()
        finally:
            group.end()
            for each, handler in previous.items():
                signal.signal(each, handler)


class _Worker:
    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self.rank = int(environment["RANK"])
        self.error_file = Path(environment[ERROR_FILE_VARIABLE])
        shows = self.rank == 0 and sys.stdout.isatty()
        pipe = None if shows else subprocess.PIPE
        # A session of its own: a terminal's interrupt comes once, from the launcher.
        self.process = subprocess.Popen(
            command, env=dict(environment), stdout=pipe, stderr=pipe, start_new_session=True
        )
        pairs = [(self.process.stdout, sys.stdout), (self.process.stderr, sys.stderr)]
        self._readers = [
            threading.Thread(target=self._copy, args=(source, target), daemon=True)
            for source, target in pairs
            if source is not None
        ]
        for reader in self._readers:
            reader.start()

    def wait(self) -> int:
        code = self.process.wait()
        for reader in self._readers:
            reader.join(1.0)
        return code

    def send(self, number: int) -> None:
        if self.process.poll() is None:
            # Its children too, such as readers of data.
            try:
                os.killpg(self.process.pid, number)
            except ProcessLookupError:
                return

    def _copy(self, source: IO[bytes], target: IO[str]) -> None:
        mark = f"[rank {self.rank}] "
        for line in source:
            text = line.decode(errors="replace").rstrip("\n")
            # In one piece: `print` writes the end of a line by itself, behind another rank's text.
            target.write((text if text.startswith(mark) else mark + text) + "\n")
            target.flush()


class _Group:
    def __init__(self) -> None:
        self._workers: list[_Worker] = []
        self._ended: queue.Queue[tuple[_Worker, int]] = queue.Queue()
        self._received: int | None = None

    def add(self, worker: _Worker) -> None:
        self._workers.append(worker)
        threading.Thread(target=self._watch, args=(worker,), daemon=True).start()
        if self._received is not None:
            worker.send(self._received)

    def wait(self) -> Failure | None:
        for _ in self._workers:
            worker, code = self._ended.get()
            if code != 0:
                self.end()
                return self._first_failure(worker, code)
        return None

    def pass_on(self, number: int, frame: object) -> None:
        self._received = number
        for worker in self._workers:
            worker.send(number)

    def end(self) -> None:
        """End what still runs, kindly at first."""
        alive = [each for each in self._workers if each.process.poll() is None]
        for worker in alive:
            worker.send(signal.SIGTERM)
        ends = time.monotonic() + GRACE_SECONDS
        for worker in alive:
            try:
                worker.process.wait(max(0.0, ends - time.monotonic()))
            except subprocess.TimeoutExpired:
                worker.send(signal.SIGKILL)
                worker.process.wait()

    def _watch(self, worker: _Worker) -> None:
        self._ended.put((worker, worker.wait()))

    def _first_failure(self, ended: _Worker, code: int) -> Failure:
        # Those that lost a failing one may have ended before it: what they reported says when.
        reports = [(read_failure(each.error_file), each) for each in self._workers]
        known = [(report, each) for report, each in reports if report is not None]
        if not known:
            return Failure(ended.rank, code, "")
        (_, message), worker = min(known, key=lambda pair: pair[0][0])
        exit_code = worker.process.returncode
        return Failure(worker.rank, code if exit_code in (None, 0) else exit_code, message)


def _passed_on() -> list[signal.Signals]:
    return [signal.SIGINT, signal.SIGTERM]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
