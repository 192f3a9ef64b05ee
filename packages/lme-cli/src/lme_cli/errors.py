"""Which exceptions are the user's to fix, and how they are shown."""

import traceback
from pathlib import Path

from lme_cli.problems import RunFileError

EXIT_FAILED = 1
EXIT_RUN_FILE = 2


class CommandError(Exception):
    """A command that cannot do what was asked; the message says why and what to do."""


def is_for_the_user(error: BaseException) -> bool:
    """Say whether `error` speaks about input, rather than being a fault of the program.

    Those are errors of ours, operating-system errors, and `ValueError`s and missing optional
    packages that our own code (not a library beneath it) raised.
    """
    if isinstance(error, CommandError | RunFileError | OSError):
        return True
    if type(error).__module__.split(".")[0].startswith("lme_"):
        return True
    return isinstance(error, ValueError | ImportError | NotImplementedError) and _raised_by_us(
        error
    )


def exit_code(error: BaseException) -> int:
    """Give 2 for a wrong run file, that of a process that failed, 1 otherwise."""
    code = getattr(error, "exit_code", None)
    if isinstance(error, CommandError) and isinstance(code, int):
        return code
    return EXIT_RUN_FILE if isinstance(error, RunFileError) else EXIT_FAILED


def describe(error: BaseException) -> str:
    """Write `error` as the user sees it, in one or more lines beginning with `error: `."""
    if isinstance(error, RunFileError):
        lines = [str(each) for each in error.problems]
        if len(lines) == 1:
            return f"error: {lines[0]}"
        listed = "\n".join(f"  {line}" for line in lines)
        return f"error: {len(lines)} problems in the run file\n{listed}"
    if isinstance(error, OSError) and error.strerror:
        about = f": {error.filename}" if error.filename else ""
        return f"error: {error.strerror.lower()}{about}"
    return f"error: {error}"


def _raised_by_us(error: BaseException) -> bool:
    frames = list(traceback.walk_tb(error.__traceback__))
    if not frames:
        return False
    file = Path(frames[-1][0].f_code.co_filename)
    return any(part.startswith("lme_") for part in file.parts)
