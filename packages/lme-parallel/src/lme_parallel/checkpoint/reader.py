"""A committed checkpoint opened for reading, and the search for the newest valid one."""

import logging
from collections.abc import Iterable, Iterator
from math import prod
from pathlib import Path

from torch import Tensor

from lme_parallel.checkpoint.arrays import (
    CHECKSUM_BYTES,
    ArrayLayout,
    read_arrays,
)
from lme_parallel.checkpoint.commit import is_committed, read_commit, verify_chunks
from lme_parallel.checkpoint.documents import Json, read_document
from lme_parallel.checkpoint.errors import CheckpointError
from lme_parallel.checkpoint.layout import METADATA_NAME, checkpoint_directory, checkpoint_steps
from lme_parallel.shards import Region

logger = logging.getLogger(__name__)


class Checkpoint:
    """A valid checkpoint.

    Args:
        path: Its directory, `.../global_step{N}`.

    Raises:
        CheckpointError: If it is not committed, or not whole.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._commit = read_commit(path)
        self._files: dict[str, dict[str, int]] = {}
        for name, record in self._commit.files.items():
            group, _, rest = name.partition("/")
            array, _, inside = rest.partition("/")
            if inside:
                self._files.setdefault(f"{group}/{array}", {})[inside] = record.size

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self._commit.step

    def names(self, group: str) -> list[str]:
        """Return the names of the arrays in `model` or `optimizer`, sorted."""
        start = f"{group}/"
        return sorted(path.removeprefix(start) for path in self._files if path.startswith(start))

    def document(self, name: str) -> dict[str, Json]:
        """Return a JSON file at the top: `config.json`, `run.resolved.json`, `state.json`.

        Raises:
            CheckpointError: If the checkpoint has no such file.
        """
        if name not in self._commit.files:
            raise CheckpointError(f"{self.path} has no {name}")
        return read_document(self.path / name)

    def layout(self, path: str) -> ArrayLayout:
        """Return shape, dtype and chunks of an array.

        Args:
            path: `model/<name>` or `optimizer/<name>`.

        Raises:
            CheckpointError: If its metadata does not fit the files that COMMIT lists.
        """
        files = dict(self._files.get(path, {}))
        if files.pop(METADATA_NAME, None) is None:
            raise CheckpointError(f"{self.path / path} is no array")
        where = str(self.path / path / METADATA_NAME)
        layout = ArrayLayout.from_metadata(read_document(self.path / path / METADATA_NAME), where)
        # Counted first: a shape may claim more chunks than could ever be listed.
        count, size = prod(layout.grid), layout.chunk_bytes + CHECKSUM_BYTES
        if count != len(files) or any(each != size for each in files.values()):
            raise CheckpointError(
                f"{where} says {count} chunks of {size} bytes, but COMMIT lists {len(files)} files"
                f" of {sum(files.values())} bytes"
            )
        missing = next((key for key, _ in layout.pieces() if key not in files), None)
        if missing is not None:
            raise CheckpointError(f"{self.path / path / missing} is not listed in COMMIT")
        return layout

    def read(self, wanted: Iterable[tuple[str, Region | None, Tensor]]) -> None:
        """Read arrays, or regions of them, into tensors.

        Args:
            wanted: Path as in `layout`; region (`None`: all); target of the region's shape on any
                device; another dtype is converted.

        Raises:
            CheckpointError: If an array is damaged.
        """
        read_arrays(self.path, self._with_layouts(wanted))

    def verify(self) -> None:
        """Compare every value with its checksum.

        Raises:
            CheckpointError: If one is damaged.
        """
        verify_chunks(self.path, self._commit)

    def _with_layouts(
        self, wanted: Iterable[tuple[str, Region | None, Tensor]]
    ) -> Iterator[tuple[str, ArrayLayout, Region | None, Tensor]]:
        for path, region, target in wanted:
            yield path, self.layout(path), region, target


def has_committed(run: Path) -> bool:
    """Return whether a run directory holds a checkpoint with a COMMIT, valid or not."""
    return any(is_committed(checkpoint_directory(run, step)) for step in checkpoint_steps(run))


def committed_steps(run: Path) -> list[int]:
    """Return the steps whose directories have a COMMIT, valid or not, ascending.

    Directories without one are what a killed save left; they are logged and left out.
    """
    steps = []
    for step in checkpoint_steps(run):
        if is_committed(checkpoint_directory(run, step)):
            steps.append(step)
        else:
            logger.warning(
                "checkpoint skipped: path=%s: it was never committed",
                checkpoint_directory(run, step),
            )
    return steps


def newest_valid(run: Path) -> Checkpoint | None:
    """Open the newest valid checkpoint, logging those skipped and why.

    Args:
        run: The run directory, or one that does not exist.

    Returns:
        The checkpoint; `None` if nothing was ever committed.

    Raises:
        CheckpointError: If there are committed checkpoints and none is valid.
    """
    return next(valid_checkpoints(run), None)


def valid_checkpoints(run: Path) -> Iterator[Checkpoint]:
    """Yield valid checkpoints, newest first.

    Args:
        run: The run directory, or one that does not exist.

    Raises:
        CheckpointError: At the end, if there are committed checkpoints and none was valid.
    """
    reasons, found = [], False
    for step in reversed(committed_steps(run)):
        path = checkpoint_directory(run, step)
        try:
            checkpoint = Checkpoint(path)
        except CheckpointError as error:
            logger.warning("checkpoint skipped: path=%s: %s", path, error)
            reasons.append(str(error))
            continue
        found = True
        yield checkpoint
    if reasons and not found:
        raise CheckpointError(
            f"no checkpoint in {run} is valid: {'; '.join(reasons)}; to start from the beginning,"
            " move them away or choose another directory"
        )
