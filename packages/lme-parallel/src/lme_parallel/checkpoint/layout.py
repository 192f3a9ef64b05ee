"""Which file of a checkpoint is where, and which names are allowed there."""

import re
from pathlib import Path

from lme_parallel.checkpoint.errors import CheckpointError

FORMAT_VERSION = 1
"""Version of the checkpoint's files; this one and the one before are read."""
COMMIT_NAME = "COMMIT"
STATE_NAME = "state.json"
POINTER_NAME = "latest_checkpointed_iteration.json"
METADATA_NAME = "zarr.json"
PARTIAL_SUFFIX = ".partial"

_DIRECTORY = re.compile(r"global_step(0|[1-9][0-9]{0,17})", re.ASCII)
# No separator, no leading dot: a name can neither climb out of its folder nor hide in it.
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,199}", re.ASCII)
_INDEX = re.compile(r"0|[1-9][0-9]{0,17}", re.ASCII)


def checkpoint_directory(run: Path, step: int) -> Path:
    """Return the directory of the checkpoint of `step` in the run directory `run`."""
    return run / f"global_step{step}"


def step_of(directory: Path) -> int | None:
    """Return the step in a checkpoint directory's name; `None` for any other name."""
    match = _DIRECTORY.fullmatch(directory.name)
    return None if match is None else int(match[1])


def checkpoint_steps(run: Path) -> list[int]:
    """Return the steps of all checkpoint directories of a run, whole or not, ascending."""
    try:
        entries = list(run.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    steps = (step_of(entry) for entry in entries)
    return sorted(step for step in steps if step is not None)


def check_array_name(name: str) -> None:
    """Raise unless an array may be called `name`.

    Raises:
        CheckpointError: If the name is empty, long, hidden, or has characters that paths do not.
    """
    if _NAME.fullmatch(name) is None or name == METADATA_NAME:
        raise CheckpointError(
            f"an array cannot be called {name!r}: allowed are up to 200 letters, digits and"
            " `_ . + -`, not starting with a dot"
        )


def check_file_name(path: str) -> None:
    """Raise unless `path` is one that a checkpoint may contain.

    Allowed are JSON documents at the top, `zarr.json` of each group, and
    `{model,optimizer}/<name>/{zarr.json,c,c/0,c/0/0,...}`.

    Args:
        path: Relative, with `/`.

    Raises:
        CheckpointError: If it is anything else.
    """
    parts = path.split("/")
    if len(parts) == 1 and _NAME.fullmatch(path) is not None and path.endswith(".json"):
        return
    if parts[0] in ("model", "optimizer"):
        if parts[1:] == [METADATA_NAME]:
            return
        if len(parts) >= 3:
            check_array_name(parts[1])
            if parts[2:] == [METADATA_NAME]:
                return
            if parts[2] == "c" and all(_INDEX.fullmatch(each) for each in parts[3:]):
                return
    raise CheckpointError(f"a checkpoint cannot contain a file called {path!r}")
