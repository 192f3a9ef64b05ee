"""Which process this is, from the variables that launchers leave; its group and its end."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import distributed
from torch.distributed import (
    PrefixStore,  # pyright: ignore[reportPrivateImportUsage]
    Store,  # pyright: ignore[reportPrivateImportUsage]
)

from lme_parallel.failures import report_failure
from lme_parallel.rendezvous import DEFAULT_SECONDS, meet

_DEFAULT_PORT = 29500
# Rank, world size, rank on the host, processes on the host; torchrun first, as it may itself run
# inside a Slurm or MPI job.
_SOURCES = {
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    "Open MPI": (
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    "MPI": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    # Set for job steps only: the batch script itself is one process.
    "Slurm": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE"),
    # Training operators number pods for torchrun, which `--nproc` stands in for.
    "Kubernetes": ("PET_NODE_RANK", "PET_NNODES", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    # An indexed job numbers pods; how many there are it does not say.
    "Kubernetes job": ("JOB_COMPLETION_INDEX", "NNODES", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
}
# Launchers that may show each process its own device only.
_BINDING = frozenset({"Open MPI", "MPI", "Slurm"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """One process among those of a run."""

    source: str
    """Who started it: `torchrun`, `Open MPI`, `MPI`, `Slurm`, `Kubernetes` or `single`."""
    rank: int
    """Number of this process, from 0."""
    world_size: int
    """Processes in all."""
    local_rank: int
    """Number of this process on its host, from 0."""
    address: str | None
    """Host of rank 0; `None` with one process."""
    port: int
    """TCP port of the rendezvous."""

    @property
    def is_pod(self) -> bool:
        """Whether this is one of several hosts rather than one of several processes."""
        return self.world_size > 1 and self.source.startswith("Kubernetes")

    def device(self) -> torch.device:
        """Return this process's accelerator, or the CPU where there is none.

        Raises:
            ValueError: If the host has fewer devices than processes.
        """
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        if accelerator is None:
            return torch.device("cpu")
        count = torch.accelerator.device_count()
        if count == 1 and self.source in _BINDING:
            return torch.device(accelerator.type, 0)
        if self.local_rank >= count:
            raise ValueError(
                f"process {self.local_rank} of this host has no device of its own: there are"
                f" {count}; start at most {count} processes a host"
            )
        return torch.device(accelerator.type, self.local_rank)


def detect(environment: Mapping[str, str]) -> Launch:
    """Find out which process this is.

    Args:
        environment: Environment variables, as in `os.environ`.

    Returns:
        The process; one process of one where no launcher left its variables.

    Raises:
        ValueError: If a variable is not a number, is missing, or contradicts another.
    """
    for source, (rank_name, world_name, local_name, _) in _SOURCES.items():
        if not _is_from(source, environment):
            continue
        world_size = _integer(environment, world_name)
        if world_size == 1:
            break
        rank = _integer(environment, rank_name)
        if not 0 <= rank < world_size:
            raise ValueError(
                f"`{rank_name}` must be from 0 to {world_size - 1} (`{world_name}` is"
                f" {world_size}), got {rank}"
            )
        return Launch(
            source=source,
            rank=rank,
            world_size=world_size,
            local_rank=_integer(environment, local_name) if local_name in environment else 0,
            address=_address(environment, source),
            port=_port(environment),
        )
    return Launch(
        source="single", rank=0, world_size=1, local_rank=0, address=None, port=_DEFAULT_PORT
    )


@contextmanager
def process_group(
    launch: Launch, *, device: torch.device, timeout_minutes: int | None = None
) -> Iterator[Store | None]:
    """Join the other processes for the length of a `with` block; one process joins nobody.

    What follows `as` is the store that the processes share, `None` for one process.

    Args:
        launch: From `detect`.
        device: Decides the backend: gloo for the CPU, with it NCCL for CUDA.
        timeout_minutes: Minutes until a stuck collective fails; `None` is torch's default.

    Raises:
        ValueError: If the address of rank 0 is not known.
        RuntimeError: If the others do not come or are of another run, within 25 seconds or
            `timeout_minutes`; the message says who is missing.
    """
    if launch.world_size == 1:
        yield None
        return
    if launch.address is None:
        raise ValueError(
            f"`MASTER_ADDR` is not set, so the {launch.world_size} processes cannot find each"
            " other; set it to the host of rank 0"
        )
    seconds = DEFAULT_SECONDS if timeout_minutes is None else 60.0 * timeout_minutes
    store = meet(
        address=launch.address,
        port=launch.port,
        rank=launch.rank,
        world_size=launch.world_size,
        seconds=seconds,
    )
    if device.type == "cuda":
        torch.cuda.set_device(device)
    distributed.init_process_group(
        backend="cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        store=PrefixStore("group", store),
        rank=launch.rank,
        world_size=launch.world_size,
        timeout=None if timeout_minutes is None else timedelta(minutes=timeout_minutes),
        device_id=device if device.type == "cuda" else None,
    )
    try:
        yield store
    except BaseException as error:
        # Before the others notice that this one is gone. The group is left as it is: taking it
        # down waits for those that wait for this process.
        report_failure(error)
        raise
    distributed.destroy_process_group()


def barrier(launch: Launch) -> None:
    """Wait until every process is here; one process waits for nobody."""
    if launch.world_size > 1:
        # On the host: the device may be busy.
        distributed.all_reduce(torch.zeros(1))


def _address(environment: Mapping[str, str], source: str) -> str | None:
    for name in ("MASTER_ADDR", "PET_MASTER_ADDR"):
        if name in environment:
            return environment[name]
    if source == "Slurm" and "SLURM_STEP_NODELIST" in environment:
        return _first_host(environment["SLURM_STEP_NODELIST"])
    return None


def _is_from(source: str, environment: Mapping[str, str]) -> bool:
    """Return whether a launcher left its variables, and no other says it better."""
    if _SOURCES[source][1] not in environment:
        return False
    # Some operators set pods' numbers as torchrun's, without a number on the host.
    pods = "PET_NNODES" in environment and "LOCAL_RANK" not in environment
    return not (source == "torchrun" and pods)


def _port(environment: Mapping[str, str]) -> int:
    for name in ("MASTER_PORT", "PET_MASTER_PORT"):
        if name in environment:
            return _integer(environment, name)
    return _DEFAULT_PORT


def _first_host(nodes: str) -> str:
    """First host of a Slurm node list: `gpu[003-010,12],cpu1` gives `gpu003`."""
    match = re.match(r"([^,\[]+)(?:\[(\d+))?", nodes)
    if match is None:
        raise ValueError(f"`SLURM_STEP_NODELIST` is no list of hosts: {nodes!r}")
    return match[1] + (match[2] or "")


def _integer(environment: Mapping[str, str], name: str) -> int:
    value = environment.get(name)
    if value is None:
        raise ValueError(f"`{name}` is not set; the launcher must set it for every process")
    try:
        return int(value)
    except ValueError:
        raise ValueError(f"`{name}` must be a whole number, got {value!r}") from None
