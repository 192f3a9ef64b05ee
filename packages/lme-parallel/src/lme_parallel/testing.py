"""Processes for tests: several that form a group, or one that is killed on the way.

All are forked from one server process, which lives as long as the tests do and has torch loaded
already, and the modules of the workspace that were loaded when the first one was started: starting
one takes milliseconds instead of seconds.
"""

import faulthandler
import importlib.util
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from datetime import timedelta
from itertools import chain
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from lme_parallel.results import read_result, write_result

_PRELOADED = (
    "torch",
    "torch._dynamo",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "lme_parallel.checkpoint.checkpointer",
    "lme_parallel.parallelize",
    "lme_parallel.equality",
    "lme_parallel.sharded",
    "lme_parallel.watchdog.watchdog",
    # What test files import themselves.
    "hypothesis",
    "pytest",
)
# What a first compilation imports, whatever its backend: seconds of it.
_COMPILER = "torch._inductor.compile_fx"
_JOIN_SECONDS = 30.0


def run_distributed(
    function: Callable[..., Any],
    world_size: int,
    *args: object,
    timeout_seconds: float = 120.0,
    device_type: str = "cpu",
) -> list[Any]:
    """Run a function in a group of processes that talk by gloo, and by NCCL on GPUs.

    Args:
        function: Defined at the top of a module or test file; called with `args`.
        world_size: Processes.
        args: Plain values that can be sent to another process.
        timeout_seconds: Until all processes are killed.
        device_type: `cuda`: each process has the GPU of its rank.

    Returns:
        What each rank returned, by rank: tensors and plain containers of them.

    Raises:
        RuntimeError: If a rank failed, with the trace of the first one, or time ran out.
    """
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            _start(function, args, Path(folder), rank, world_size, device_type)
            for rank in range(world_size)
        ]
        _join(processes, timeout_seconds)
        _raise_failures(processes, Path(folder))
        return [read_result(Path(folder) / f"result-{rank}") for rank in range(world_size)]


def run_until_ended(
    function: Callable[..., Any], world_size: int, *args: object, timeout_seconds: float = 60.0
) -> list[int | None]:
    """Run a function in a group of processes that may end in any way.

    Args:
        function: Defined at the top of a module or test file; called with `args`.
        world_size: Processes.
        args: Plain values that can be sent to another process.
        timeout_seconds: Until those that still run are killed.

    Returns:
        Exit codes by rank; `None` for those that had to be killed from here.
    """
    (codes,) = run_groups_until_ended(function, world_size, [args], timeout_seconds=timeout_seconds)
    return codes


def run_groups_until_ended(
    function: Callable[..., Any],
    world_size: int,
    calls: Sequence[tuple[object, ...]],
    *,
    at_once: int = 5,
    timeout_seconds: float = 60.0,
) -> list[list[int | None]]:
    """Run a function in several groups of processes that may end in any way.

    A group waits more than it computes, so that several at once take hardly longer than one.

    Args:
        function: Defined at the top of a module or test file.
        world_size: Processes of each group.
        calls: The arguments for each group: plain values that can be sent to another process.
        at_once: Groups that run at the same time.
        timeout_seconds: Of so many groups, until those that still run are killed.

    Returns:
        For each group, exit codes by rank; `None` for those that had to be killed from here.
    """
    codes = []
    for first in range(0, len(calls), at_once):
        with ExitStack() as stack:
            # All from one thread: starting a process looks after those that ended.
            groups = []
            for args in calls[first : first + at_once]:
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
                ranks = range(world_size)
                groups.append([_start(function, args, folder, each, world_size) for each in ranks])
            codes += _end_groups(groups, timeout_seconds)
    return codes


def run_killed(
    function: Callable[..., Any],
    *args: object,
    after_seconds: float | None = None,
    timeout_seconds: float = 60.0,
) -> bool:
    """Run a function in one process that may be killed, by itself or from here.

    Args:
        function: Defined at the top of a module or test file; called with `args`. It may call
            `kill_this_process`.
        args: Plain values that can be sent to another process.
        after_seconds: Kill it then; `None`: it does so itself, or ends.
        timeout_seconds: Until it counts as hanging.

    Returns:
        Whether it was killed; false if it came to its end.

    Raises:
        RuntimeError: If it failed or hung.
    """
    with tempfile.TemporaryDirectory() as folder:
        process = _start(function, args, Path(folder), rank=0, world_size=1)
        if after_seconds is not None:
            process.join(after_seconds)
            process.kill()
        _join([process], timeout_seconds)
        if process.exitcode == -signal.SIGKILL:
            return True
        _raise_failures([process], Path(folder))
        return False


def kill_this_process() -> None:
    """End this process at once, as a crash would: nothing is flushed, no handler runs."""
    os.kill(os.getpid(), signal.SIGKILL)


def _start(
    function: Callable[..., Any],
    args: tuple[object, ...],
    folder: Path,
    rank: int,
    world_size: int,
    device_type: str = "cpu",
) -> BaseProcess:
    context = get_context("forkserver")
    # Without effect once the server runs.
    context.set_forkserver_preload([*_PRELOADED, *_further_modules()])
    # By file and name: a test file is not importable by name in another process.
    source = sys.modules[function.__module__].__file__
    process = context.Process(
        target=_enter,
        args=(source, function.__qualname__, args, str(folder), rank, world_size, device_type),
        daemon=True,
    )
    process.start()
    return process


def _further_modules() -> list[str]:
    """Return what else the server loads: the compiler, and what is loaded here of the workspace.

    Private modules are left out: programs, and kernels in languages that need more than torch.
    Nothing where there is a GPU: a server that has spoken to its driver must not be forked.
    """
    if torch.cuda.is_available():
        return []
    ours = (name for name in sys.modules if name.startswith("lme_") and "._" not in name)
    return [_COMPILER, *sorted(ours)]


def _enter(
    source: str,
    name: str,
    args: tuple[object, ...],
    folder: str,
    rank: int,
    world_size: int,
    device_type: str,
) -> None:
    code = 0
    # Open until the process ends: a crash in torch's own code raises nothing.
    crash = (Path(folder) / f"crash-{rank}").open("w", encoding="utf-8")
    faulthandler.enable(crash)
    try:
        torch.set_num_threads(1)
        if device_type == "cuda":
            torch.cuda.set_device(rank)
        if world_size > 1:
            # As a launcher would: code that asks for its rank finds the same one.
            os.environ |= {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world_size),
                "MASTER_ADDR": "127.0.0.1",
            }
            distributed.init_process_group(
                "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo",
                init_method=f"file://{folder}/rendezvous",
                rank=rank,
                world_size=world_size,
                timeout=timedelta(seconds=60),
            )
        result = getattr(load_source(source), name)(*args)
        write_result(Path(folder) / f"result-{rank}", result)
        if world_size > 1:
            distributed.barrier()
            distributed.destroy_process_group()
    except BaseException:
        (Path(folder) / f"trace-{rank}").write_text(traceback.format_exc())
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    # Skips the interpreter's teardown, in which some versions of torch abort.
    os._exit(code)


def load_source(source: str) -> Any:  # a module, whose names are not known here
    """Import a file that is in no package, such as one of tests.

    Args:
        source: Its path.

    Raises:
        ValueError: If it is no Python source.
    """
    name = f"lme_parallel_source_{Path(source).stem}"
    specification = importlib.util.spec_from_file_location(name, source)
    if specification is None or specification.loader is None:
        raise ValueError(f"{source} cannot be imported")
    module = importlib.util.module_from_spec(specification)
    # Where dataclasses look their own module up.
    sys.modules[specification.name] = module
    specification.loader.exec_module(module)
    return module


def _end_groups(
    groups: Sequence[list[BaseProcess]], timeout_seconds: float
) -> list[list[int | None]]:
    ends = time.monotonic() + timeout_seconds
    for process in chain.from_iterable(groups):
        process.join(max(0.0, ends - time.monotonic()))
    codes = [[process.exitcode for process in processes] for processes in groups]
    for process in chain.from_iterable(groups):
        process.kill()
        process.join(_JOIN_SECONDS)
    return codes


def _join(processes: list[BaseProcess], timeout_seconds: float) -> None:
    remaining = timeout_seconds
    for process in processes:
        process.join(remaining)
        if process.exitcode is None:
            for each in processes:
                each.kill()
                each.join(_JOIN_SECONDS)
            raise RuntimeError(f"processes were killed after {timeout_seconds} seconds")
        if process.exitcode != 0:
            # The others wait for this one in vain.
            remaining = min(remaining, 2.0)


def _raise_failures(processes: list[BaseProcess], folder: Path) -> None:
    codes = [process.exitcode for process in processes]
    if any(codes):
        # The first to fail says why; the others only lost it. One that crashed came before them.
        found = sorted(folder.glob("trace-*"), key=lambda path: path.stat().st_mtime_ns)
        crashes = [each for each in sorted(folder.glob("crash-*")) if each.stat().st_size]
        traces = [path.read_text() for path in (*crashes, *found)]
        raise RuntimeError(f"processes ended with codes {codes}\n" + "\n".join(traces[:1]))
