"""Logging, set up once: format, level, rank filter."""

import logging
import sys
import warnings
from typing import TextIO

_COLOURS = {
    logging.DEBUG: "\x1b[2m",
    logging.WARNING: "\x1b[33m",
    logging.ERROR: "\x1b[31m",
    logging.CRITICAL: "\x1b[31;1m",
}


# Its lines are the metrics records, which the display shows as they come.
_SHOWN_ELSEWHERE = "lme_core.training.hooks"


def configure(level: str = "INFO", *, colored: bool = False, rank: int = 0) -> None:
    """Send the log to standard error.

    Args:
        level: Name of the lowest level shown, as in `logging_args.logging_level`.
        colored: Colour by level, where standard error is a terminal.
        rank: This process's number; ranks above 0 show warnings and errors only, marked with it.
    """
    chosen = logging.getLevelNamesMapping().get(level.upper())
    if chosen is None:
        allowed = ", ".join(logging.getLevelNamesMapping())
        raise ValueError(f"`logging_level` must be one of {allowed}, got `{level}`")
    handler = _CurrentStderr()
    handler.setFormatter(_Formatter(colored=colored and sys.stderr.isatty(), rank=rank))
    handler.addFilter(_from_us_or_serious)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(max(chosen, logging.WARNING) if rank else chosen)
    logging.captureWarnings(True)
    warnings.formatwarning = _format_warning


def _format_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    line: str | None = None,
) -> str:
    """Write what is meant for users without the line of code that said it."""
    where = (
        ""
        if category is UserWarning or category.__module__.startswith("lme_")
        else (f" ({category.__name__}, {filename}:{lineno})")
    )
    return f"{message}{where}"


def _from_us_or_serious(record: logging.LogRecord) -> bool:
    """Keep other libraries' chatter out, and what the display already shows."""
    if record.levelno >= logging.WARNING:
        return True
    return record.name.startswith("lme_") and record.name != _SHOWN_ELSEWHERE


class _CurrentStderr(logging.StreamHandler[TextIO]):
    """Writes to what `sys.stderr` is now: a progress bar replaces it while it is drawn."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # pyright: ignore[reportIncompatibleVariableOverride] - read only
        return sys.stderr


class _Formatter(logging.Formatter):
    def __init__(self, *, colored: bool, rank: int) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s", "%H:%M:%S")
        self._colored = colored
        self._prefix = f"[rank {rank}] " if rank else ""

    def format(self, record: logging.LogRecord) -> str:
        line = self._prefix + super().format(record)
        colour = _COLOURS.get(record.levelno)
        return f"{colour}{line}\x1b[0m" if self._colored and colour else line
