"""Directories that appear whole or not at all."""

import contextlib
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

from lme_convert.errors import ModelDirectoryError


@contextlib.contextmanager
def staged_directory(destination: Path) -> Iterator[Path]:
    """Give a temporary sibling to write in; rename it to `destination` when the block ends well.

    Everything in it is synced before the rename, so that a crash at any moment leaves either
    nothing under the final name or the complete directory. If the block raises, the sibling is
    removed; one that a killed process left behind is removed by the next call for the same
    destination on the same machine.

    Args:
        destination: Where the directory shall be; absent, or an empty directory.

    Yields:
        The sibling to write in, `.<name>.partial-<host>-<process id>`.

    Raises:
        ModelDirectoryError: If `destination` exists and is not an empty directory.
    """
    destination = Path(os.path.abspath(destination))  # noqa: PTH100 (keeps a final link unresolved)
    _check_free(destination)
    destination.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(destination)
    staging = destination.parent / f"{_prefix(destination)}{os.getpid()}"
    staging.mkdir()
    try:
        yield staging
        sync_tree(staging)
        _check_free(destination)
        if destination.exists():
            destination.rmdir()
        staging.rename(destination)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    _sync(destination.parent)


def sync_tree(directory: Path) -> None:
    """Flush every file of a flat directory, then the directory itself, to stable storage."""
    for path in sorted(directory.iterdir()):
        _sync(path)
    _sync(directory)


def _check_free(destination: Path) -> None:
    if destination.is_dir() and not any(destination.iterdir()):
        return
    if destination.exists() or destination.is_symlink():
        raise ModelDirectoryError(
            f"`{destination}` already exists and is not empty; nothing is overwritten: remove it "
            "or choose another destination"
        )


def _prefix(destination: Path) -> str:
    return f".{destination.name}.partial-{socket.gethostname()}-"


def _remove_abandoned(destination: Path) -> None:
    prefix = _prefix(destination)
    for sibling in destination.parent.glob(f"{_escaped(prefix)}*"):
        process = sibling.name.removeprefix(prefix)
        if process.isdigit() and (int(process) == os.getpid() or not _alive(int(process))):
            shutil.rmtree(sibling, ignore_errors=True)


def _escaped(text: str) -> str:
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in text)


def _alive(process: int) -> bool:
    if os.name != "posix":
        # There `os.kill` would end the process instead of asking about it.
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _sync(path: Path) -> None:
    if os.name != "posix" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
