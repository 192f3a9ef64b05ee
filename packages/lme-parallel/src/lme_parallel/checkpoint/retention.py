"""Which checkpoints go, and how they go: never the last valid one, never half of one visibly."""

import logging
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from lme_parallel.checkpoint.arrays import Point
from lme_parallel.checkpoint.commit import is_committed, read_commit
from lme_parallel.checkpoint.documents import sync
from lme_parallel.checkpoint.errors import CheckpointError
from lme_parallel.checkpoint.layout import COMMIT_NAME, checkpoint_directory, checkpoint_steps

logger = logging.getLogger(__name__)


def steps_to_remove(
    steps: Sequence[int],
    is_valid: Callable[[int], bool],
    *,
    keep_last: int,
    keep_every: int | None,
) -> list[int]:
    """Choose which checkpoints go.

    Args:
        steps: All checkpoints, valid or not.
        is_valid: Whether the checkpoint of a step is valid; asked for the newest ones only.
        keep_last: The newest this many valid ones stay, at least 1.
        keep_every: Multiples of this step stay; `None`: none is special.

    Returns:
        Steps to remove, ascending; none while no checkpoint is valid.
    """
    removed, kept = [], 0
    for step in sorted(steps, reverse=True):
        if kept < keep_last:
            if is_valid(step):
                kept += 1
            else:
                removed.append(step)
        elif keep_every is None or step % keep_every:
            removed.append(step)
    return sorted(removed) if kept else []


def prune(
    run: Path, newest: int, *, keep_last: int | None, keep_every: int | None, point: Point
) -> None:
    """Remove what retention does not keep, and what never became a checkpoint.

    Nothing newer than `newest` is touched.

    Args:
        run: The run directory.
        newest: Step of the checkpoint just written.
        keep_last: The newest this many valid ones stay; `None`: nothing is removed.
        keep_every: Multiples of this step stay; `None`: none is special.
        point: Called before each step.
    """
    if keep_last is None:
        return

    def is_valid(step: int) -> bool:
        try:
            read_commit(checkpoint_directory(run, step))
        except CheckpointError as error:
            logger.warning("checkpoint is not valid and is removed: step=%d: %s", step, error)
            return False
        return True

    steps = [step for step in checkpoint_steps(run) if step <= newest]
    for step in steps_to_remove(steps, is_valid, keep_last=keep_last, keep_every=keep_every):
        remove(checkpoint_directory(run, step), point)


def remove(directory: Path, point: Point) -> None:
    """Remove a checkpoint, or what is left of one.

    COMMIT goes first, so that a half-removed directory is not taken for a checkpoint.

    Args:
        directory: The checkpoint's directory.
        point: Called before each step.
    """
    if is_committed(directory):
        point(f"uncommit {directory.name}")
        (directory / COMMIT_NAME).unlink()
        point(f"sync uncommitted {directory.name}")
        sync(directory)
    point(f"remove {directory.name}")
    if directory.is_symlink():
        directory.unlink()
    else:
        shutil.rmtree(directory)
    point(f"removed {directory.name}")
    logger.info("checkpoint removed: path=%s", directory)
