"""What the processes of a run tell each other about themselves, through a store."""

import os
import signal
from collections.abc import Iterable, Mapping
from datetime import timedelta

from torch.distributed import (
    PrefixStore,  # pyright: ignore[reportPrivateImportUsage]
    Store,  # pyright: ignore[reportPrivateImportUsage]
)

from lme_parallel.watchdog.snapshot import Snapshot, process_status
from lme_parallel.watchdog.verdict import Absence


class Board:
    """Reports of all processes. No call waits for a key that is not there.

    Args:
        store: Shared by the processes.
    """

    def __init__(self, store: Store) -> None:
        # A connection of its own: one that waits for the others serves nobody else.
        self._store = PrefixStore("watchdog", store.clone())

    def report(self, snapshot: Snapshot) -> None:
        """Say where this process is."""
        self._store.set(f"beat/{snapshot.rank}", snapshot.encode())

    def wait_for(self, ranks: Iterable[int], seconds: float) -> None:
        """Wait until processes reported once, at most so long."""
        try:
            self._store.wait([f"beat/{rank}" for rank in ranks], timedelta(seconds=seconds))
        except RuntimeError:
            # Who is not there is found out later.
            return

    def last_report(self, rank: int) -> Snapshot | None:
        """Read where a process was when it reported last; `None` if it never did."""
        return self._read(f"beat/{rank}")

    def raise_alarm(self) -> bool:
        """Ask all processes to answer; true for the first that does so: it judges."""
        return self._store.add("alarm", 1) == 1

    def is_alarmed(self) -> bool:
        """Whether somebody asked."""
        return self._store.check(["alarm"])

    def answer(self, snapshot: Snapshot) -> None:
        """Say in detail where this process is."""
        self._store.set(f"answer/{snapshot.rank}", snapshot.encode())

    def answer_of(self, rank: int) -> Snapshot | None:
        """Read what a process answered; `None` if it did not."""
        return self._read(f"answer/{rank}")

    def close_case(self, sentence: str) -> None:
        """Tell all processes the verdict."""
        self._store.set("verdict", sentence)

    def verdict(self) -> str | None:
        """Read the verdict; `None` before there is one."""
        return self._store.get("verdict").decode() if self._store.check(["verdict"]) else None

    def acknowledge(self) -> None:
        """Say that this process heard the verdict."""
        self._store.add("heard", 1)

    def heard(self) -> int:
        """Count the processes that heard the verdict."""
        return self._store.add("heard", 0)

    def _read(self, key: str) -> Snapshot | None:
        return Snapshot.decode(self._store.get(key)) if self._store.check([key]) else None


def absence(last: Snapshot | None, host: str) -> Absence | None:
    """Ask the system why a process does not answer.

    Args:
        last: What it reported last.
        host: This host.

    Returns:
        Why; `None` if it runs. One of another host is silent.
    """
    if last is None or last.host != host:
        return "silent"
    status, born = process_status(last.process)
    if status == "unknown":
        return "silent"
    if status == "gone" or born != last.born:
        return "gone"
    return "stopped" if status == "stopped" else None


def absences(seen: Mapping[int, Snapshot], own: Snapshot, world_size: int) -> dict[int, Absence]:
    """Guess, without the store, who does not answer.

    Args:
        seen: Last report of each other process, as far as there were any.
        own: What this process is.
        world_size: Number of processes.

    Returns:
        Those of this host that do not run; if all run, those that never reported; if all did, the
        first one, which has the store, unless that is this one.
    """
    found: dict[int, Absence] = {}
    for rank, each in seen.items():
        why = absence(each, own.host) if each.host == own.host else None
        if why is not None and each.state != "left":
            found[rank] = why
    if found:
        return found
    never = sorted(set(range(world_size)) - {*seen, own.rank})
    return dict.fromkeys(never or [0] * bool(own.rank), "silent")


def end_absent(reports: Mapping[int, Snapshot], absent: Iterable[int], host: str) -> None:
    """Kill the processes of this host that do not answer: they cannot end themselves.

    Args:
        reports: Last report of each process.
        absent: Those that do not answer.
        host: This host.
    """
    for rank in absent:
        last = reports.get(rank)
        if last is None or last.host != host or last.process == os.getpid():
            continue
        status, born = process_status(last.process)
        if status in ("running", "stopped") and born == last.born:
            os.kill(last.process, signal.SIGKILL)
