"""One checkpoint written: arrays, documents, sync, COMMIT; or nothing at all."""

import logging
import os
import shutil
from pathlib import Path

from lme_parallel.checkpoint.arrays import Point, create_arrays, write_arrays
from lme_parallel.checkpoint.commit import is_committed, sync_all, write_commit
from lme_parallel.checkpoint.crew import Crew
from lme_parallel.checkpoint.documents import encode, replace_durably, sync, write_bytes
from lme_parallel.checkpoint.errors import CheckpointError
from lme_parallel.checkpoint.layout import (
    METADATA_NAME,
    PARTIAL_SUFFIX,
    POINTER_NAME,
    checkpoint_directory,
)
from lme_parallel.checkpoint.retention import remove
from lme_parallel.checkpoint.snapshot import Snapshot

logger = logging.getLogger(__name__)

_GROUPS = ("model", "optimizer")
# Directories, metadata and the blocks of small files, per array.
_OVERHEAD_BYTES = 32 * 1024


def write_checkpoint(run: Path, snapshot: Snapshot, point: Point, crew: Crew | None = None) -> None:
    """Write a checkpoint and commit it.

    The first process makes directories and documents, all write and sync their chunks, and the
    first commits when all are done.

    Whatever is in its place goes first. After a failure its directory is removed again, so that
    the space is free; other checkpoints are not touched.

    Args:
        run: The run directory; made if absent.
        snapshot: What to write.
        point: Called before each step.
        crew: The processes that write it, all at the same time; `None`: this one.

    Raises:
        CheckpointError: If the disk is too small or a write fails, in any process.
    """
    crew = Crew() if crew is None else crew
    root = checkpoint_directory(run, snapshot.step)
    try:
        needed = sum(crew.gather(_needed_bytes(snapshot)))
        files: dict[str, int] = {}
        with crew.together():
            if crew.is_first:
                point("make run directory")
                _make_directory(run)
                if os.path.lexists(root):
                    remove(root, point)
                _check_space(run, needed)
                files = _prepare(root, snapshot, point)
        with crew.together():
            written = write_arrays(root, snapshot.tensors, point)
            if not crew.is_first:
                sync_all(root, written, point)
        with crew.together():
            if crew.is_first:
                sync_all(root, files, point)
                write_commit(root, snapshot.step, files, point)
    except (OSError, CheckpointError) as error:
        if crew.is_first:
            _discard(root)
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise CheckpointError(
            f"the checkpoint of step {snapshot.step} was not saved in {run}: {reason}; earlier"
            " checkpoints are unchanged"
        ) from error


def write_pointer(run: Path, step: int, point: Point) -> None:
    """Point `latest_checkpointed_iteration.json` at a committed checkpoint, at once.

    Args:
        run: The run directory.
        step: Of the checkpoint.
        point: Called before each step.
    """
    content = encode({"latest_checkpointed_iteration": step}, POINTER_NAME)
    point("move pointer")
    replace_durably(run / POINTER_NAME, content, run / (POINTER_NAME + PARTIAL_SUFFIX))
    point("pointer moved")


def _prepare(root: Path, snapshot: Snapshot, point: Point) -> dict[str, int]:
    """Make everything but chunks, and return the sizes of all files that there will be."""
    files: dict[str, int] = {}
    for directory in (root, *(root / group for group in _GROUPS)):
        point(f"make {directory.name}/")
        directory.mkdir()
        name = (directory / METADATA_NAME).relative_to(root).as_posix()
        group = {"zarr_format": 3, "node_type": "group", "attributes": {}}
        content = encode(group, name)
        write_bytes(root / name, content)
        files[name] = len(content)
    files |= create_arrays(root, snapshot.arrays, point)
    for name, content in snapshot.documents.items():
        point(f"write {name}")
        write_bytes(root / name, content)
        files[name] = len(content)
    return files


def _make_directory(path: Path) -> None:
    """Make a directory and its parents, each on disk before the next."""
    if path.is_dir():
        return
    _make_directory(path.parent)
    path.mkdir(exist_ok=True)
    sync(path.parent)


def _needed_bytes(snapshot: Snapshot) -> int:
    needed = sum(each.stored_bytes + _OVERHEAD_BYTES for each in snapshot.tensors)
    return needed + sum(len(each) for each in snapshot.documents.values())


def _check_space(run: Path, needed: int) -> None:
    free = shutil.disk_usage(run).free
    if needed > free:
        raise CheckpointError(
            f"it needs {needed / 2**30:.2f} GiB, but {free / 2**30:.2f} GiB are free; make room,"
            " or set `save_args.keep_last` so that old checkpoints go"
        )


def _discard(root: Path) -> None:
    if is_committed(root):
        return
    try:
        shutil.rmtree(root)
    except FileNotFoundError:
        return
    except OSError as error:
        logger.warning("unfinished checkpoint left behind: path=%s: %s", root, error)
