"""`metrics.jsonl`: one JSON object a line, append-only, never ahead of the restored step."""

import json
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


class JsonLines:
    """Appends records to a file, one line each, in the order of their steps.

    Each line is one write, so that a killed process leaves at most a part of the last line, which
    the next `start` removes. `flush` is called before every checkpoint: a committed step's lines
    are on disk.
    """

    def __init__(self, path: Path) -> None:
        """Name the file; nothing is opened yet.

        Args:
            path: Made if absent, with its folder.
        """
        self._path = path
        self._descriptor: int | None = None

    def start(self, step: int) -> None:
        """Open the file without the lines of steps after `step` and without a broken last line.

        Args:
            step: Optimizer steps done in the state that was restored; 0 for a new run.
        """
        self._path.parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND
        self._descriptor = os.open(self._path, flags, 0o644)
        self.rewind(step)

    def rewind(self, step: int) -> None:
        """Take back the lines of steps after `step`, and a broken last line.

        Args:
            step: Optimizer steps done in the state that the run went back to.
        """
        if self._descriptor is None:
            raise RuntimeError("`start` must be called before `rewind`")
        size = os.fstat(self._descriptor).st_size
        kept = _length_up_to(self._path, step)
        if kept < size:
            logger.info("metrics cut back: step=%d dropped_bytes=%d", step, size - kept)
            os.ftruncate(self._descriptor, kept)
            os.fsync(self._descriptor)

    def log(self, record: Mapping[str, Any]) -> None:
        """Append a record. Numbers that are not finite become null, as JSON has none."""
        if self._descriptor is None:
            raise RuntimeError("`start` must be called before `log`")
        plain = {name: _plain(value) for name, value in record.items()}
        line = (json.dumps(plain, allow_nan=False) + "\n").encode()
        while line:
            line = line[os.write(self._descriptor, line) :]

    def flush(self) -> None:
        """Wait until the lines so far are on disk."""
        if self._descriptor is not None:
            os.fsync(self._descriptor)

    def finish(self) -> None:
        """Close the file."""
        if self._descriptor is not None:
            os.fsync(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = None

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: the file itself is the state."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take nothing."""


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _length_up_to(path: Path, step: int) -> int:
    """Return how many bytes of whole lines come before the first one of a later step."""
    length = 0
    with path.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                break
            try:
                record = json.loads(line)
            except ValueError:
                break
            if not isinstance(record, dict) or not isinstance(record.get("step"), int):
                break
            if record["step"] > step:
                break
            length += len(line)
    return length
