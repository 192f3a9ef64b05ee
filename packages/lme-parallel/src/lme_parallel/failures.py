"""What a process and its launcher know of each other's end."""

import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path

ERROR_FILE_VARIABLE = "TORCHELASTIC_ERROR_FILE"
"""Where a process writes why it failed; torchrun sets it too and reads the same format."""
LAUNCHER_VARIABLE = "LME_LAUNCHER_PROCESS"
"""Number of the process that started this one and ends it."""
_PARENT_DEATH_SIGNAL = 1


def report_failure(error: BaseException, environment: Mapping[str, str] = os.environ) -> None:
    """Write why this process fails where its launcher looks, the first time only.

    Args:
        error: What was raised.
        environment: With the name of the file, where there is a launcher.
    """
    name = environment.get(ERROR_FILE_VARIABLE)
    if name is None or Path(name).exists():
        return
    text = f"{type(error).__name__}: {error}"
    details = {"py_callstack": text, "timestamp": str(int(time.time()))}
    content = {"message": {"message": text, "extraInfo": details}, "time_ns": time.time_ns()}
    try:
        Path(name).write_text(json.dumps(content), encoding="utf-8")
    except OSError:
        # There are other ways to find out; the error itself goes on.
        return


def read_failure(file: Path) -> tuple[int, str] | None:
    """Return when a process reported to fail, in nanoseconds, and why; `None` if it did not.

    Args:
        file: What its `TORCHELASTIC_ERROR_FILE` named.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        message = content["message"]
        text = message["message"] if isinstance(message, dict) else message
        return int(content.get("time_ns") or file.stat().st_mtime_ns), str(text)
    except (OSError, ValueError, KeyError, AttributeError):
        return None


def follow_launcher(environment: Mapping[str, str]) -> None:
    """Ask the system to end this process when the launcher that started it is gone.

    Only Linux can. Without a launcher nothing happens.

    Args:
        environment: Environment variables.
    """
    launcher = environment.get(LAUNCHER_VARIABLE)
    if launcher is None or sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, int(signal.SIGTERM))
    if os.getppid() != int(launcher):
        # It went before the system was asked.
        raise RuntimeError(f"the launcher, process {launcher}, is gone")
