"""`--nproc`: the processes that a run starts on this host, alone or beside other hosts."""

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from lme_cli.errors import CommandError
from lme_parallel.launch import Launch, detect
from lme_parallel.launcher import run_workers, worker_environments


class WorkerFailedError(CommandError):
    """A process of the run failed; carries its exit code."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True, slots=True)
class Hosts:
    """Which processes there are, and which of them this one starts."""

    launch: Launch
    """This process: a worker, or the one that starts the workers of its host."""
    nproc: int | None
    """Workers to start here; `None`: this is a worker itself."""

    @property
    def starts_workers(self) -> bool:
        """Whether this process only starts others."""
        return self.nproc is not None

    @property
    def world_size(self) -> int:
        """Workers on all hosts."""
        return self.launch.world_size * (self.nproc or 1)

    def first_worker(self) -> Launch:
        """Return the first worker of this host, or this one."""
        if self.nproc is None:
            return self.launch
        return replace(self.launch, rank=self.launch.rank * self.nproc, world_size=self.world_size)


def find_hosts(nproc: int | None, environment: Mapping[str, str]) -> Hosts:
    """Find out what `--nproc` means here.

    Args:
        nproc: As given; without it, and outside torchrun, `PET_NPROC_PER_NODE` counts.
        environment: Environment variables.

    Raises:
        CommandError: If processes were started already by someone else.
        ValueError: If a variable is wrong.
    """
    launch = detect(environment)
    is_worker = "LOCAL_RANK" in environment or launch.local_rank > 0
    wanted = environment.get("PET_NPROC_PER_NODE", "")
    if nproc is None and not is_worker and wanted.isdecimal():
        nproc = int(wanted)
    if nproc is None or (nproc == 1 and not launch.is_pod):
        return Hosts(launch, None)
    if is_worker:
        raise CommandError(
            f"`--nproc {nproc}` starts processes itself, but {launch.source} started this one as"
            f" number {launch.local_rank} of its host; leave `--nproc` out, or start one task a host"
        )
    return Hosts(launch, nproc)


def launch_workers(hosts: Hosts, arguments: Sequence[str]) -> None:
    """Run `lme` with the same arguments in each worker of this host, until all ended.

    Args:
        hosts: From `find_hosts`.
        arguments: Of `lme`.

    Raises:
        WorkerFailedError: If one failed, with what it said.
    """
    command = [sys.executable, "-m", "lme_cli", *arguments]
    environments = worker_environments(hosts.nproc or 1, hosts.launch, os.environ)
    failure = run_workers(command, environments)
    if failure is None:
        return
    if failure.message.startswith("HangError: "):
        # It names the process that was to blame, which may not be the one that said so first.
        raise WorkerFailedError(failure.message.removeprefix("HangError: "), 1)
    said = f": {failure.message}" if failure.message else ""
    code = failure.exit_code
    how = f"was ended by signal {-code}" if code < 0 else f"failed first, with exit code {code}"
    raise WorkerFailedError(f"rank {failure.rank} {how}{said}", 128 - code if code < 0 else code)
