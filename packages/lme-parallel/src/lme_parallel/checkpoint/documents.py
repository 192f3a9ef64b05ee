"""Small JSON files: strict reading, durable writing."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lme_parallel.checkpoint.errors import CheckpointError

Json = Any  # None, bool, int, float, str, list or dict of these

_MAX_BYTES = 256 * 2**20


def encode(value: Json, where: str) -> bytes:
    """Return `value` as JSON.

    Args:
        value: Of JSON types only, keys of dictionaries strings; tuples become lists.
        where: Name for the error.

    Raises:
        CheckpointError: If something in it is not JSON, naming where it is.
    """
    _check(value, where)
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()


def decode(content: bytes, where: str) -> dict[str, Json]:
    """Return the JSON object in `content`.

    Raises:
        CheckpointError: If it is not one JSON object, or a key stands twice in one.
    """
    try:
        value = json.loads(content.decode(), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{where} must hold a JSON object, got {type(value).__name__}")
    return value


def read_bytes(path: Path) -> bytes:
    """Return the content of a regular file of at most 256 MiB.

    Raises:
        CheckpointError: If it is missing, larger, a link or no file.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be opened: {error.strerror}") from error
    with os.fdopen(descriptor, "rb") as file:
        try:
            size = os.fstat(descriptor).st_size
            if size > _MAX_BYTES:
                raise CheckpointError(f"{path} has {size} bytes, more than {_MAX_BYTES}")
            return file.read(_MAX_BYTES)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error


def read_document(path: Path) -> dict[str, Json]:
    """Return the JSON object in a file.

    Raises:
        CheckpointError: As in `read_bytes` and `decode`.
    """
    return decode(read_bytes(path), str(path))


def write_bytes(path: Path, content: bytes) -> None:
    """Write a new file; it is on disk only after `sync`."""
    with path.open("wb") as file:
        file.write(content)


def replace_durably(path: Path, content: bytes, partial: Path) -> None:
    """Replace a file at once: readers see the old content or the new, also after a crash."""
    write_bytes(partial, content)
    sync(partial)
    partial.replace(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Wait until a file or directory is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _check(value: Json, where: str) -> None:
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise CheckpointError(f"{where} has a key that is not a string: {key!r}")
            _check(item, f"{where}.{key}")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            _check(item, f"{where}[{index}]")
    elif value is not None and not isinstance(value, (bool, int, float, str)):
        raise CheckpointError(f"{where} is a {type(value).__name__}, which JSON cannot hold")


def _unique(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} stands twice")
    return result
