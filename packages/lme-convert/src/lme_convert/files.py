"""Files from strangers: where they lie and what they hold is checked before it is believed."""

import json
import stat
from collections.abc import Mapping
from pathlib import Path

from lme_convert.errors import ModelDirectoryError

_MAX_BYTES = 64 * 1024**2


def check_regular_file(path: Path) -> None:
    """Refuse what is not a plain file (a pipe would block, a device would not end).

    Raises:
        ModelDirectoryError: If `path` is missing, unreadable or not a regular file.
    """
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        raise ModelDirectoryError(f"`{path}` is missing or cannot be read: {error}") from error
    if not stat.S_ISREG(mode):
        raise ModelDirectoryError(f"`{path}` is not a regular file")


def contained_file(directory: Path, name: str) -> Path:
    """Find a file of a directory, and refuse one that lies outside it.

    The links of a HuggingFace cache (`snapshots/<revision>/` into `blobs/` of the same repository)
    are the one exception.

    Args:
        directory: Where the file must be, directly.
        name: Plain file name.

    Returns:
        Its path with every link resolved.

    Raises:
        ModelDirectoryError: If `name` is not a plain name, or the file is missing, leads outside
            `directory` or is not a regular file.
    """
    if not name or Path(name).name != name or name == ".." or any(c in name for c in "\\\0"):
        raise ModelDirectoryError(
            f"{name!r} in `{directory}` is not a plain file name; files outside the directory are "
            "not read"
        )
    try:
        root, target = directory.resolve(), (directory / name).resolve()
    except (OSError, RuntimeError) as error:
        raise ModelDirectoryError(f"`{directory / name}` cannot be resolved: {error}") from error
    allowed = [root]
    if root.parent.name == "snapshots":
        allowed.append(root.parent.parent / "blobs")
    if target.parent not in allowed:
        raise ModelDirectoryError(
            f"`{directory / name}` is a link to `{target}`, outside the directory; put the file "
            "itself there"
        )
    check_regular_file(target)
    return target


def read_json_object(path: Path) -> dict[str, object]:
    """Read a JSON object.

    Raises:
        ModelDirectoryError: If the file is not a regular file of at most 64 MiB that holds one
            JSON object without duplicate keys.
    """
    check_regular_file(path)
    size = path.stat().st_size
    if size > _MAX_BYTES:
        raise ModelDirectoryError(f"`{path}` has {size} bytes; at most {_MAX_BYTES} are read")
    try:
        value = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique)
    except RecursionError as error:
        raise ModelDirectoryError(f"`{path}` is nested too deeply") from error
    except (OSError, ValueError) as error:
        raise ModelDirectoryError(f"`{path}` is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelDirectoryError(f"`{path}` must hold a JSON object, got {type(value).__name__}")
    return value


def write_json(path: Path, value: Mapping[str, object]) -> None:
    """Write a JSON object, keys in the order given, two spaces of indentation."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    value = dict(pairs)
    if len(value) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"key `{twice}` appears twice")
    return value
