"""What one process is doing: its phase, its source line, the collectives that it called."""

import importlib
import json
import linecache
import os
import socket
import sys
import sysconfig
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import torch
from torch import distributed

State = Literal["running", "failed", "lost", "left"]
"""`failed`: raised an error of its own; `lost`: a collective raised one, as it does when another
process is gone; `left`: came to its end."""

_TORCH = str(Path(torch.__file__).parent) + os.sep
_COLLECTIVES = _TORCH + "distributed" + os.sep
_LIBRARIES = (
    _TORCH,
    sysconfig.get_path("stdlib") + os.sep,
    str(Path(__file__).parent) + os.sep,
    "<frozen ",
)
# The last calls of each group that are compared between processes.
_KEPT_CALLS = 200
A_COLLECTIVE = "a collective"
"""What a process waits in if its own stack does not say which."""
HELPER_THREADS = "lme-"
"""Prefix of the names of threads that work for the main thread, such as readers of data."""


@dataclass(frozen=True, slots=True)
class Call:
    """One collective, in the order in which its group numbers them."""

    number: int
    """Of the group's collectives, from 1."""
    name: str
    """Such as `all_reduce`."""
    sizes: list[list[int]]
    """Shapes of its inputs."""
    is_done: bool
    """Whether this process knows that it is complete."""


@dataclass(frozen=True, slots=True)
class Group:
    """What a process called in one process group."""

    name: str
    members: list[int]
    """Global ranks."""
    calls: list[Call]
    """The last ones, oldest first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """One process at one moment."""

    rank: int
    host: str
    process: int
    born: int | None
    """When the process started, in ticks since the system did; tells it from a later one of the
    same number. `None` where the system does not say."""
    number: int = 0
    """Counts this process's reports, so that a reader sees whether it still reports."""
    state: State = "running"
    phase: str = "start"
    seconds: float = 0.0
    """Since the last sign of progress."""
    location: str = ""
    """File and line."""
    waits_in: str | None = None
    """The collective that the main thread waits in."""
    message: str = ""
    """What a failed process raised."""
    groups: list[Group] = field(default_factory=list)
    """Filled in only when somebody asks what holds up the run."""

    def encode(self) -> str:
        """Write as JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def decode(cls, text: str | bytes) -> "Snapshot":
        """Read what `encode` wrote."""
        values = json.loads(text)
        groups = [
            Group(each["name"], each["members"], [Call(**call) for call in each["calls"]])
            for each in values.pop("groups")
        ]
        return cls(**values, groups=groups)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a thread is."""

    location: str
    """File and line of the innermost function that belongs to no library."""
    waits_in: str | None
    """The collective inside which it is."""
    is_in_library: bool
    """Whether a library's code runs, called from there."""


def identity(rank: int) -> Snapshot:
    """Say who this process is.

    Args:
        rank: Its number.
    """
    born = process_status(os.getpid())[1]
    return Snapshot(rank=rank, host=socket.gethostname(), process=os.getpid(), born=born)


def place_of(frames: Iterable[tuple[FrameType, int]]) -> Place:
    """Find the line of ours, or of the user's, that a thread is at.

    Args:
        frames: With the line each is at, innermost first.
    """
    waits_in: str | None = None
    innermost: str | None = None
    is_in_library = False
    for frame, line in frames:
        file, name = frame.f_code.co_filename, frame.f_code.co_name
        innermost = innermost or f"{file}:{line}"
        if file.startswith(_COLLECTIVES) and name != "wrapper":
            # The outermost one is what was called.
            waits_in = name.lstrip("_") or name
        if not file.startswith(_LIBRARIES):
            if not is_in_library and ".wait(" in linecache.getline(file, line):
                # Work of a collective: anything else that waits does so in Python.
                waits_in = A_COLLECTIVE
            return Place(f"{file}:{line}", waits_in, is_in_library)
        is_in_library = True
    return Place(innermost or "", waits_in, is_in_library)


def stack(frame: FrameType | None) -> Iterator[tuple[FrameType, int]]:
    """Give the frames of a running thread, innermost first."""
    while frame is not None:
        yield frame, frame.f_lineno
        frame = frame.f_back


def raised_at(error: BaseException) -> Place:
    """Find where an error was raised."""
    frames: list[tuple[FrameType, int]] = []
    trace = error.__traceback__
    while trace is not None:
        frames.append((trace.tb_frame, trace.tb_lineno))
        trace = trace.tb_next
    return place_of(reversed(frames))


def main_place(phase: str) -> Place:
    """Find where the main thread is, or the thread that reads its data if it waits for that.

    Args:
        phase: What the main thread does.
    """
    frames = sys._current_frames()
    place = place_of(stack(frames.get(threading.main_thread().ident or 0)))
    if phase != "data" or not place.is_in_library:
        return place
    for thread in threading.enumerate():
        if thread.name.startswith(HELPER_THREADS) and thread.ident in frames:
            helper = place_of(stack(frames[thread.ident]))
            if helper.location and not helper.location.startswith(_LIBRARIES):
                return helper
    return place


def called_collectives() -> list[Group]:
    """Read which collectives this process called, from torch's flight recorder.

    Returns:
        By group; nothing where torch keeps no record.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return []
    members = _members()
    found: dict[str, list[Call]] = {}
    for entry in _recorded():
        name = entry["process_group"][0]
        if entry["is_p2p"] or name not in members:
            continue
        call = Call(
            number=int(entry["collective_seq_id"]),
            name=str(entry["profiling_name"]).rpartition(":")[2],
            sizes=entry["input_sizes"],
            is_done=bool(entry["retired"]) or entry["state"] == "completed",
        )
        found.setdefault(name, []).append(call)
    return [Group(name, members[name], calls[-_KEPT_CALLS:]) for name, calls in found.items()]


def process_status(process: int) -> tuple[Literal["running", "stopped", "gone", "unknown"], int]:
    """Ask the system about a process of this host.

    Args:
        process: Its number.

    Returns:
        What it does, and when it started in ticks; `unknown` where the system does not say.
    """
    if not Path("/proc/self/stat").exists():
        return "unknown", 0
    try:
        text = Path(f"/proc/{process}/stat").read_text(encoding="utf-8")
    except OSError:
        return "gone", 0
    # The name of the program, in parentheses, may hold anything.
    fields = text.rpartition(")")[2].split()
    born = int(fields[19])
    if fields[0] in "ZXx":
        return "gone", born
    return ("stopped" if fields[0] in "Tt" else "running"), born


def _recorded() -> Sequence[dict[str, Any]]:
    # No public function reads the record without pickle.
    module: Any = importlib.import_module("torch._C._distributed_c10d")
    entries: list[dict[str, Any]] = []
    for reader in ("_dump_fr_trace_json", "_dump_nccl_trace_json"):
        read = getattr(module, reader, None)
        if read is not None:
            entries += json.loads(read()).get("entries", [])
    return entries


def _members() -> dict[str, list[int]]:
    """Global ranks of each group, by the name that the record uses."""
    world: Any = distributed.distributed_c10d._world
    names = dict(world.pg_names)
    # Groups that this process is no member of are in one table and not in the other.
    ranks = {group: each for group, each in world.pg_group_ranks.items() if group in names}
    return {names[group]: sorted(each) for group, each in ranks.items()}
