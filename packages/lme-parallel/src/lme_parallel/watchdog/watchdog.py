"""A thread in each process that notices when a run hangs, says why, and ends it."""

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import TracebackType

from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage]

from lme_parallel.failures import report_failure
from lme_parallel.watchdog.board import Board, absence, absences, end_absent
from lme_parallel.watchdog.snapshot import (
    A_COLLECTIVE,
    Snapshot,
    State,
    called_collectives,
    identity,
    main_place,
    raised_at,
)
from lme_parallel.watchdog.verdict import Absence, judge

EXIT_CODE = 1
"""With which processes that a watchdog ends do so."""
_LONGEST_BEAT = 5.0
_POLL = 0.05
_READ_AT_ONCE = 16


class HangError(RuntimeError):
    """A process of the run held up the others; the message says which and where."""


class Watchdog:
    """Watches this process and, with those of the others, the run; a context manager.

    The main thread calls `mark` when it begins something else. Where it does not for a while, or
    raises an error, or where another process stops to report, all processes report in detail, one
    of them prints who holds up the run, and all write the stacks of their threads to a file and
    end. Processes of one host that do not answer are killed.

    Args:
        store: Shared by the processes.
        rank: Of this process.
        world_size: How many processes there are.
        seconds: Without progress, until a process counts as hanging. A phase that takes longer by
            nature needs marks in between.
        folder: For `stacks-rank{r}.txt`, and `hang-{process of rank 0}.txt` with the sentence;
            made if needed.
        say: Takes the sentence, in one process; `None` prints it to standard error.
    """

    def __init__(
        self,
        store: Store,
        *,
        rank: int,
        world_size: int,
        seconds: float,
        folder: Path,
        say: Callable[[str], None] | None = None,
    ) -> None:
        if seconds <= 0:
            raise ValueError(f"`seconds` of a watchdog must be above 0, got {seconds}")
        self._board = Board(store)
        self._rank = rank
        self._world_size = world_size
        self._seconds = seconds
        self._beat = min(_LONGEST_BEAT, seconds / 5)
        self._patience = min(30.0, max(0.5, seconds / 4))
        self._folder = folder
        self._stacks_path = folder / f"stacks-rank{rank}.txt"
        self._say = say or _print
        self._me = identity(rank)
        # Replaced as a whole, so that another thread never sees half of it.
        self._marked = ("start", time.monotonic())
        self._ended: Snapshot | None = None
        self._wake = threading.Event()
        self._is_over = threading.Event()
        self._talked = time.monotonic()
        self._threads: list[threading.Thread] = []
        self._is_store_lost = threading.Event()
        self._seen: dict[int, Snapshot] = {}
        self._neighbour = (rank + 1) % world_size
        # Number of its last report, and when it came.
        self._heard = (-1, time.monotonic())

    def mark(self, phase: str) -> None:
        """Note that the main thread made progress and what it does now; costs next to nothing.

        Args:
            phase: Such as `data`, `forward`, `backward`, `clip`, `optimizer`, `checkpoint`.
        """
        self._marked = (phase, time.monotonic())

    def __enter__(self) -> "Watchdog":
        """Start to watch."""
        self._folder.mkdir(parents=True, exist_ok=True)
        self._stacks = self._stacks_path.open("w", encoding="utf-8")
        self.mark("start")
        self._board.report(self._me)
        self._board.wait_for({0, self._neighbour}, self._patience)
        for target in (self._talk, self._guard):
            thread = threading.Thread(
                target=target, name=f"watchdog-{target.__name__}", daemon=True
            )
            thread.start()
            self._threads.append(thread)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop to watch; after an error, wait until it is known who caused it."""
        if error is None or isinstance(error, KeyboardInterrupt):
            self._ended = self._look("left")
        else:
            self._ended = self._blame(error)
        self._wake.set()
        talker, guard = self._threads
        talker.join(self._beat if error is None else 4 * self._patience)
        if self._ended.state != "left" and self._is_store_lost.is_set():
            guard.join(self._patience)
        self._is_over.set()
        faulthandler.cancel_dump_traceback_later()
        if talker.is_alive():
            # It waits for a store that does not answer.
            return
        self._stacks.close()
        if self._stacks_path.exists() and self._stacks_path.stat().st_size == 0:
            self._stacks_path.unlink()

    def _blame(self, error: BaseException) -> Snapshot:
        place = raised_at(error)
        state: State = "failed" if place.waits_in is None else "lost"
        message = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        if isinstance(error, SystemExit):
            message = f"it left with exit code {error.code or 0}"
        return replace(
            self._look(state), location=place.location, waits_in=place.waits_in, message=message
        )

    def _look(self, state: State = "running") -> Snapshot:
        phase, since = self._marked
        place = main_place(phase)
        return replace(
            self._me,
            state=state,
            phase=phase,
            seconds=time.monotonic() - since,
            location=place.location,
            waits_in=place.waits_in,
        )

    def _talk(self) -> None:
        """Report, read about other processes, and see to it that alarms are answered."""
        number = 0
        try:
            while True:
                number += 1
                snapshot = replace(self._ended or self._look(), number=number)
                self._board.report(snapshot)
                self._talked = time.monotonic()
                if snapshot.state == "left":
                    return
                # Without Python: for the case that something does not let this thread run.
                faulthandler.dump_traceback_later(self._seconds, file=self._stacks)
                is_due = snapshot.state != "running" or snapshot.seconds > self._seconds
                if self._listen() or is_due or self._board.is_alarmed():
                    self._settle()
                    return
                if self._wake.wait(self._beat):
                    self._wake.clear()
        except RuntimeError:
            # The store is gone; the guard finds out whether it matters.
            self._is_store_lost.set()

    def _listen(self) -> bool:
        """Read about the next process, and the first; true if one of them is gone."""
        # The first usually keeps the store, and without that nobody can ask about it.
        unknown = [rank for rank in range(self._world_size) if rank not in self._seen]
        for rank in {self._neighbour, 0, *unknown[:_READ_AT_ONCE]} - {self._rank}:
            last = self._board.last_report(rank)
            if last is not None:
                self._seen[rank] = last
        last = self._seen.get(self._neighbour)
        now = time.monotonic()
        if last is None or last.number != self._heard[0]:
            self._heard = (-1 if last is None else last.number, now)
        if last is not None and last.state == "left":
            # Nobody is left to look after at the end of the circle.
            self._neighbour = (self._neighbour + 1) % self._world_size
            self._heard = (-1, now)
            return False
        is_gone = last is not None and absence(last, self._me.host) == "gone"
        return is_gone or now - self._heard[1] > self._seconds + 2 * self._beat

    def _guard(self) -> None:
        """Judge without the store, where it does not answer and this process cannot go on."""
        while not self._is_over.wait(self._beat):
            now = time.monotonic()
            has_failed = self._ended is not None and self._ended.state != "left"
            is_stuck = now - self._marked[1] > self._seconds
            silence = now - self._talked
            is_silent = silence > self._patience + max(self._seconds, 2 * self._beat)
            if (has_failed or is_stuck) and (is_silent or self._is_store_lost.is_set()):
                self._judge_alone()
                return

    def _settle(self) -> None:
        """Answer, judge or wait for the judge, and end this process."""
        is_judge = self._board.raise_alarm()
        self._board.answer(self._in_detail())
        if is_judge:
            snapshots, absent = self._gather()
            verdict = judge(snapshots, absent)
            sentence = self._with_stacks(verdict.sentence)
            self._announce(sentence)
            end_absent(snapshots, absent, self._me.host)
            self._board.close_case(sentence)
            self._end(sentence, listeners=self._world_size - len(absent))
            return
        ends = time.monotonic() + 2 * self._patience
        while time.monotonic() < ends:
            self._talked = time.monotonic()
            sentence = self._board.verdict()
            if sentence is not None:
                self._end(sentence, listeners=self._world_size)
                return
            time.sleep(_POLL)
        self._judge_alone()

    def _in_detail(self) -> Snapshot:
        try:
            groups = called_collectives()
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError):
            # The record is torch's own and may change; the rest is known without it.
            groups = []
        snapshot = replace(self._ended or self._look(), groups=groups)
        if snapshot.waits_in != A_COLLECTIVE:
            return snapshot
        calls = [call for group in snapshot.groups for call in group.calls if not call.is_done]
        return replace(snapshot, waits_in=calls[-1].name) if calls else snapshot

    def _gather(self) -> tuple[dict[int, Snapshot], dict[int, Absence]]:
        """Collect answers until all are there, or only those miss that cannot give one."""
        ends = time.monotonic() + self._patience
        found: dict[int, Snapshot] = {}
        absent: dict[int, Absence] = {}
        waiting = set(range(self._world_size))
        while waiting:
            self._talked = time.monotonic()
            is_late = self._talked >= ends
            for rank in sorted(waiting):
                answer = self._board.answer_of(rank)
                last = answer or self._board.last_report(rank)
                if last is not None:
                    found[rank] = last
                if answer is not None or (last is not None and last.state == "left"):
                    waiting.discard(rank)
                    continue
                why = absence(last, self._me.host) if last is not None else None
                if why in ("gone", "stopped") or is_late:
                    absent[rank] = why or "silent"
                    waiting.discard(rank)
            if waiting:
                time.sleep(_POLL)
        return found, absent

    def _judge_alone(self) -> None:
        """Say what is known here: the store is lost, and with it the answers of the others."""
        absent = absences(self._seen, self._me, self._world_size)
        snapshots = {**self._seen, self._rank: self._in_detail()}
        sentence = self._with_stacks(judge(snapshots, absent).sentence)
        self._announce(sentence)
        end_absent(snapshots, absent, self._me.host)
        self._end(sentence, listeners=0)

    def _end(self, sentence: str, *, listeners: int) -> None:
        """Write the stacks and end this process, unless its own error does that."""
        if listeners:
            self._board.acknowledge()
        ends = time.monotonic() + self._patience
        # The store may be in this process: the others must have heard.
        while self._rank == 0 and time.monotonic() < ends:
            if self._board.heard() >= listeners:
                break
            time.sleep(_POLL)
        if self._ended is not None and self._ended.state == "failed":
            return
        faulthandler.cancel_dump_traceback_later()
        faulthandler.dump_traceback(file=self._stacks, all_threads=True)
        self._stacks.flush()
        report_failure(HangError(sentence))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(EXIT_CODE)

    def _announce(self, sentence: str) -> None:
        """Say it, unless another process did while the store was lost."""
        first = self._me if self._rank == 0 else self._seen.get(0, self._me)
        try:
            with (self._folder / f"hang-{first.process}.txt").open("x", encoding="utf-8") as file:
                file.write(sentence + "\n")
        except FileExistsError:
            return
        self._say(sentence)

    def _with_stacks(self, sentence: str) -> str:
        return f"{sentence} (stacks of all threads: {self._folder}/stacks-rank*.txt)"


def _print(sentence: str) -> None:
    sys.stderr.write(sentence + "\n")
    sys.stderr.flush()
