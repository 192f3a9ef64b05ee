"""What a run shows: a table before, a bar or plain lines during, the next commands after."""

import math
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TextIO

from lme_cli.charts import short
from lme_cli.problems import Problem


def print_warnings(problems: Iterable[Problem]) -> None:
    """Print one line a warning on standard error."""
    for each in problems:
        print(f"warning: {each}", file=sys.stderr)


def print_table(title: str, rows: Sequence[tuple[str, str]], stream: TextIO | None = None) -> None:
    """Print names and values in two columns."""
    out = stream or sys.stdout
    width = max((len(name) for name, _ in rows), default=0)
    print(title, file=out)
    for name, value in rows:
        print(f"  {name:<{width}}  {value}", file=out)
    out.flush()


def print_next(commands: Sequence[tuple[str, str]]) -> None:
    """Print commands to try, each with what it does."""
    print("\nNext:")
    for command, meaning in commands:
        print(f"  {command}\n      {meaning}")


def duration(seconds: float) -> str:
    """Write a time as `1:02:03` or `4:05`."""
    whole = max(0, round(seconds))
    hours, rest = divmod(whole, 3600)
    minutes, left = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{left:02}" if hours else f"{minutes}:{left:02}"


class Progress:
    """Shows the metrics records of a run as they come; one more tracker.

    On a terminal it draws one bar. Elsewhere it prints one line a record, without control
    characters.
    """

    def __init__(self, total_steps: int, *, stream: TextIO | None = None) -> None:
        """Draw nothing yet.

        Args:
            total_steps: Length of the run in optimizer steps.
            stream: Where to; standard output if `None`.
        """
        self._total = total_steps
        self._stream = stream or sys.stdout
        self._first_step = 0
        self._began = 0.0
        self._bar: _Bar | None = None
        self._validation = math.nan

    def start(self, step: int) -> None:
        """Begin at a step."""
        self._first_step = step
        self._began = time.monotonic()
        if self._stream.isatty():
            self._bar = _Bar(self._total, step)

    def log(self, record: Mapping[str, Any]) -> None:  # values differ by key
        """Show one record."""
        if record["context"] != "train":
            self._evaluated(record)
            return
        step, loss = int(record["step"]), float(record["loss"])
        rate = float(record.get("tokens_per_second") or 0.0)
        left = self._seconds_left(step)
        if self._bar is not None:
            self._bar.update(step, loss, self._validation, record["learning_rate"], rate)
            return
        self._line(
            f"step {step:,}/{self._total:,}  loss {loss:.4f}  "
            f"learning rate {record['learning_rate']:.2e}  {rate:,.0f} tokens/s  "
            f"{duration(left)} left"
        )

    def flush(self) -> None:
        """Nothing can be lost."""

    def finish(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def state_dict(self) -> dict[str, Any]:
        """Give nothing: what is shown is not part of the run."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take nothing."""

    def _evaluated(self, record: Mapping[str, Any]) -> None:
        name = {"val": "validation", "test": "test"}.get(record["context"], record["context"])
        group = f" {record['group']}" if record.get("group") else ""
        loss = float(record["loss"])
        if record["context"] == "val" and not group:
            self._validation = loss
        self._line(f"step {int(record['step']):,}/{self._total:,}  {name}{group} loss {loss:.4f}")

    def _line(self, text: str) -> None:
        if self._bar is not None:
            self._bar.print(text)
        else:
            print(text, file=self._stream, flush=True)

    def _seconds_left(self, step: int) -> float:
        done = step - self._first_step
        if done <= 0:
            return 0.0
        return (time.monotonic() - self._began) / done * (self._total - step)


class _Bar:
    """The bar of a terminal."""

    def __init__(self, total: int, step: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        self._progress = RichProgress(
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(elapsed_when_finished=True),
            # Long runs must not make the estimate sluggish, short ones not jumpy.
            speed_estimate_period=60,
            # Drawing takes time from the cores that train.
            refresh_per_second=2,
        )
        self._progress.start()
        self._task = self._progress.add_task("", total=total, completed=step, numbers="starting")

    def update(
        self, step: int, loss: float, validation: float, learning_rate: float, rate: float
    ) -> None:
        seen = f" val {validation:.4f}" if math.isfinite(validation) else ""
        numbers = f"loss {loss:.4f}{seen}  lr {learning_rate:.1e}  {short(round(rate))} tokens/s"
        self._progress.update(self._task, completed=step, numbers=numbers)

    def print(self, text: str) -> None:
        self._progress.console.print(text, highlight=False, markup=False)

    def close(self) -> None:
        self._progress.stop()
