"""The COMMIT file: what makes a directory a checkpoint, and the check that it still is one."""

import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import google_crc32c

from lme_parallel.checkpoint.arrays import CHECKSUM_BYTES, Point
from lme_parallel.checkpoint.documents import (
    Json,
    encode,
    read_bytes,
    read_document,
    replace_durably,
    sync,
)
from lme_parallel.checkpoint.errors import CheckpointError
from lme_parallel.checkpoint.layout import (
    COMMIT_NAME,
    FORMAT_VERSION,
    PARTIAL_SUFFIX,
    check_file_name,
    step_of,
)

_SYNC_THREADS = 16
_WORKING_VERSIONS = {FORMAT_VERSION: "0.1"}


@dataclass(frozen=True, slots=True)
class FileRecord:
    """What COMMIT says about one file."""

    size: int
    """Bytes."""
    crc32c: int
    """Of the content before any checksum codec: of a chunk, the four bytes stored at its end."""


@dataclass(frozen=True, slots=True)
class Commit:
    """Content of a valid COMMIT file."""

    step: int
    files: dict[str, FileRecord]
    """By path relative to the checkpoint."""


def sync_all(root: Path, files: Iterable[str], point: Point) -> None:
    """Wait until files, the directories they are in and `root` itself are on disk.

    Args:
        root: The checkpoint's directory.
        files: Paths relative to `root`.
        point: Called before each file and directory.
    """
    files = list(files)
    parents = {parent.as_posix() for name in files for parent in Path(name).parents}
    # Each sync makes the disk flush its cache, also where nothing is left to write; those that
    # wait at the same time share a flush.
    with ThreadPoolExecutor(_SYNC_THREADS) as pool:
        list(
            pool.map(
                sync, _announced(root, [*files, *sorted(f"{each}/" for each in parents)], point)
            )
        )
    point("sync run directory")
    sync(root.parent)


def write_commit(root: Path, step: int, files: Mapping[str, int], point: Point) -> None:
    """Make a directory whose files are on disk a checkpoint.

    Args:
        root: The checkpoint's directory.
        step: Optimizer steps done.
        files: Size in bytes of every file that belongs to it, by path relative to `root`.
        point: Called before each step.

    Raises:
        CheckpointError: If a file is missing or has another size.
    """
    point("collect checksums")
    records = {}
    for name in sorted(files):
        record = _record(root / name, is_chunk=_is_chunk(name))
        if record.size != files[name]:
            raise CheckpointError(
                f"{root / name} has {record.size} bytes after {files[name]} were written"
            )
        records[name] = {"size": record.size, "crc32c": record.crc32c}
    content = {"format_version": FORMAT_VERSION, "step": step, "files": records}
    point("commit")
    replace_durably(
        root / COMMIT_NAME, encode(content, COMMIT_NAME), root / (COMMIT_NAME + PARTIAL_SUFFIX)
    )
    point("committed")


def is_committed(root: Path) -> bool:
    """Return whether a directory has a COMMIT file, valid or not."""
    return os.path.lexists(root / COMMIT_NAME)


def read_commit(root: Path) -> Commit:
    """Check that a directory is a checkpoint, whole and unchanged, and return its COMMIT.

    Every file that COMMIT lists must be there, a plain file in plain directories, of the right
    size and checksum. Of chunks only the stored checksum is compared; the values are checked
    against it when they are read, or by `verify_chunks`.

    Args:
        root: The checkpoint's directory.

    Raises:
        CheckpointError: If it is not, with the first reason.
    """
    commit = _parse(root)
    for directory in sorted({parent for name in commit.files for parent in Path(name).parents}):
        _check_directory(root / directory)
    for name, expected in commit.files.items():
        found = _record(root / name, is_chunk=_is_chunk(name))
        if found.size != expected.size:
            raise CheckpointError(
                f"{root / name} has {found.size} bytes, but COMMIT says {expected.size}"
            )
        if found.crc32c != expected.crc32c:
            raise CheckpointError(
                f"{root / name} has checksum {found.crc32c:08x}, but COMMIT says"
                f" {expected.crc32c:08x}"
            )
    return commit


def verify_chunks(root: Path, commit: Commit) -> None:
    """Read every chunk and compare its values with its checksum.

    Args:
        root: The checkpoint's directory.
        commit: Its COMMIT.

    Raises:
        CheckpointError: If one differs.
    """
    for name, record in commit.files.items():
        if _is_chunk(name):
            content = (root / name).read_bytes()
            if google_crc32c.value(content[:-CHECKSUM_BYTES]) != record.crc32c:
                raise CheckpointError(f"{root / name}: the values do not match their checksum")


def _check_directory(path: Path) -> None:
    try:
        mode = path.lstat().st_mode
    except OSError as error:
        raise CheckpointError(f"{path} is missing: {error.strerror}") from error
    if not stat.S_ISDIR(mode):
        raise CheckpointError(f"{path} is not a directory")


def _announced(root: Path, files: list[str], point: Point) -> Iterator[Path]:
    for name in files:
        point(f"sync {name}")
        yield root / name


def _is_chunk(name: str) -> bool:
    parts = name.split("/")
    return len(parts) >= 3 and parts[2] == "c"


def _record(path: Path, *, is_chunk: bool) -> FileRecord:
    try:
        if not is_chunk:
            content = read_bytes(path)
            return FileRecord(len(content), google_crc32c.value(content))
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode) or status.st_size < CHECKSUM_BYTES:
                raise CheckpointError(f"{path} is not a chunk")
            stored = os.pread(descriptor, CHECKSUM_BYTES, status.st_size - CHECKSUM_BYTES)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    return FileRecord(status.st_size, int.from_bytes(stored, "little"))


def _parse(root: Path) -> Commit:
    if root.is_symlink():
        raise CheckpointError(f"{root} is a link, not a directory")
    content = read_document(root / COMMIT_NAME)
    version = content.get("format_version")
    if version not in _WORKING_VERSIONS:
        raise CheckpointError(
            f"{root} has `format_version` {version!r:.50}; this version of lme-parallel reads"
            f" {', '.join(map(str, _WORKING_VERSIONS))}; use a newer one"
        )
    step, listed = content.get("step"), content.get("files")
    if type(step) is not int or step != step_of(root):
        raise CheckpointError(f"{root / COMMIT_NAME} is of step {step!r:.50}")
    if set(content) != {"format_version", "step", "files"} or not isinstance(listed, dict):
        raise CheckpointError(f"{root / COMMIT_NAME} has other keys than it should")
    return Commit(step, {name: _parse_record(root, name, each) for name, each in listed.items()})


def _parse_record(root: Path, name: str, record: Json) -> FileRecord:
    check_file_name(name)
    if isinstance(record, dict) and set(record) == {"size", "crc32c"}:
        size, crc32c = record["size"], record["crc32c"]
        if type(size) is int and type(crc32c) is int and size >= 0 and 0 <= crc32c < 2**32:
            return FileRecord(size, crc32c)
    raise CheckpointError(f"{root / COMMIT_NAME} has no valid entry for {name!r:.100}")
