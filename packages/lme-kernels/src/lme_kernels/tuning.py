"""Launch settings of kernels: rules by shape, measured settings from a file, and the search."""

import json
import logging
import os
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, fields
from functools import cache, lru_cache
from importlib.resources import files
from pathlib import Path

import torch

from lme_kernels import __version__

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RowSettings:
    """How a kernel over rows is launched."""

    block_rows: int
    """Rows a program holds at once, a power of two."""
    block_columns: int
    """Columns a program holds, the power of two that covers a row."""
    num_warps: int
    """Warps a program."""
    programs: int
    """Programs that share all rows where each takes many (backward of weights)."""


# What `using` fixes, for the launches of one thread or task.
FIXED: ContextVar[tuple[str, RowSettings] | None] = ContextVar("lme_kernels_fixed", default=None)


def next_power_of_two(n: int) -> int:
    """Least power of two that is at least `n`, and at least 1."""
    return 1 << max(n - 1, 0).bit_length()


def ceil_div(n: int, d: int) -> int:
    """`n / d`, rounded up; `triton.cdiv` takes microseconds on the host."""
    return -(-n // d)


@lru_cache(maxsize=4096)
def row_settings(
    op: str, rows: int, columns: int, element_bytes: int, processors: int
) -> RowSettings:
    """Launch settings of a kernel over rows: measured ones if there are any, else by rule.

    Args:
        op: Name of the kernel: the op's, followed by `.forward` or `.backward`.
        rows: Number of rows.
        columns: Number of columns.
        element_bytes: Bytes of an element.
        processors: Multiprocessors of the device.

    Returns:
        The settings. Nothing is measured here.
    """
    measured = stored_settings(op, bucket(rows, columns, element_bytes))
    if measured is not None:
        return measured
    block_columns = next_power_of_two(columns)
    backward = op.endswith(".backward")
    # About 4096 elements a program fill the memory pipeline without spilling registers.
    block_rows = max(1, min(16, 4096 // block_columns, next_power_of_two(rows)))
    # The backward holds more values an element: x, dy, the weight and its gradient, a gate.
    elements_per_warp = 512 if backward else 1024
    if op == "gated_rmsnorm.backward":
        elements_per_warp = 256
    # 1024 threads a program at most: AMD's wavefronts have 64.
    most = 16 if torch.version.hip else 32
    num_warps = max(1, min(most, block_rows * block_columns // elements_per_warp))
    # Programs that fit on a multiprocessor together, by the registers that the compiled kernels
    # take: 80 a thread in the leanest, up to 128. One more would run alone at the end.
    lean = op in ("rmsnorm.backward", "p_norm.backward") and block_rows <= 2
    resident = max(1, (24 if lean else 16) // num_warps)
    programs = min(processors * resident, ceil_div(rows, block_rows))
    return RowSettings(block_rows, block_columns, num_warps, max(1, programs))


def bucket(rows: int, columns: int, element_bytes: int) -> str:
    """Key of measured settings: rows to the next power of two, columns exactly."""
    return f"{next_power_of_two(rows)}x{columns}x{element_bytes}"


def cache_path() -> Path:
    """File of the settings measured on this kind of device with this version of the package."""
    root = os.environ.get("XDG_CACHE_HOME")
    folder = Path(root) if root else Path.home() / ".cache"
    return folder / "lme_kernels" / _architecture() / f"{__version__}.json"


def stored_settings(op: str, key: str) -> RowSettings | None:
    """Look measured settings up; never measures, and reads the files once a process.

    The user's file comes first, then the one that this package ships for the architecture, if any
    (`settings/<architecture>.json`).

    Args:
        op: Name of the kernel.
        key: Bucket of the shape.

    Returns:
        The settings, or `None` if there are none or `LME_KERNELS_TUNE` is "off".
    """
    if os.environ.get("LME_KERNELS_TUNE", "cached") == "off":
        return None
    shipped = Path(str(files("lme_kernels"))) / "settings" / f"{_architecture()}.json"
    for path in (cache_path(), shipped):
        entry = _stored(path).get(op, {}).get(key)
        if entry is not None and set(entry) == {each.name for each in fields(RowSettings)}:
            return RowSettings(**entry)
    return None


def row_candidates(op: str, rows: int, columns: int, processors: int) -> list[RowSettings]:
    """List settings worth measuring, the rule's among them or near it.

    Args:
        op: Name of the kernel: the op's, followed by `.forward` or `.backward`.
        rows: Number of rows.
        columns: Number of columns.
        processors: Multiprocessors of the device.

    Returns:
        Every sensible number of rows and warps a program and, for a backward, of programs.
    """
    block_columns = next_power_of_two(columns)
    shares = (1, 2, 3, 4, 6, 8) if op.endswith(".backward") else (1,)
    return [
        RowSettings(block_rows, block_columns, num_warps, min(processors * share, rows))
        for block_rows in (1, 2, 4, 8, 16)
        for num_warps in (1, 2, 4, 8, 16, 32)
        for share in shares
        # From 4 to 64 numbers a thread, and programs that can be resident together.
        if 128 * num_warps <= block_rows * block_columns <= 2048 * num_warps
        and num_warps * share <= 64
    ]


@contextmanager
def using(op: str, settings: RowSettings) -> Iterator[None]:
    """Launch one kernel with given settings inside a `with` block, in this thread only.

    Args:
        op: Name of the kernel.
        settings: What to launch it with.

    Yields:
        Nothing.
    """
    token = FIXED.set((op, settings))
    try:
        yield
    finally:
        FIXED.reset(token)


def search(
    op: str,
    key: str,
    candidates: Iterable[RowSettings],
    measure: Callable[[RowSettings], float],
) -> RowSettings:
    """Measure candidates and keep the fastest in the file; called by hand, never by an op.

    Args:
        op: Name of the kernel.
        key: Bucket of the shape.
        candidates: Settings to try.
        measure: Seconds a launch takes; one that cannot be launched raises `RuntimeError` and is
            left out.

    Returns:
        The fastest. Processes that start later use it.

    Raises:
        ValueError: If no candidate could be launched.
    """
    timed: list[tuple[float, RowSettings]] = []
    for candidate in candidates:
        try:
            timed.append((measure(candidate), candidate))
        except RuntimeError as error:
            logger.info("candidate left out: op=%s settings=%s error=%s", op, candidate, error)
    if not timed:
        raise ValueError(f"none of the candidates for `{op}` could be launched at {key}")
    seconds, best = min(timed, key=lambda pair: pair[0])
    store(op, key, best)
    logger.info("settings stored: op=%s key=%s seconds=%.3g settings=%s", op, key, seconds, best)
    return best


def store(op: str, key: str, settings: RowSettings) -> None:
    """Write settings to the file, which other processes may be reading or writing.

    Args:
        op: Name of the kernel.
        key: Bucket of the shape.
        settings: What to keep.
    """
    path = cache_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {name: dict(entries) for name, entries in _read(path).items()}
    content.setdefault(op, {})[key] = asdict(settings)
    # Renamed into place: a reader sees the old file or the new one. Of two writers at once the
    # later wins, which costs a measurement and never a run.
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(content, indent=1, sort_keys=True))
    temporary.replace(path)


def _architecture() -> str:
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        return f"sm{major}{minor}"
    return platform.machine()


@cache
def _stored(path: Path) -> Mapping[str, Mapping[str, Mapping[str, int]]]:
    return _read(path)


def _read(path: Path) -> Mapping[str, Mapping[str, Mapping[str, int]]]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        # Absent, unreadable or half a file of some other program: the rules serve.
        return {}
    return content if isinstance(content, dict) else {}
