"""How the processes of a run find each other: soon, or with an error that says what is wrong."""

import json
import os
import socket
import time
from datetime import timedelta

import torch
from torch.distributed import (
    PrefixStore,  # pyright: ignore[reportPrivateImportUsage]
    Store,  # pyright: ignore[reportPrivateImportUsage]
    TCPStore,  # pyright: ignore[reportPrivateImportUsage]
)

from lme_parallel import __version__

DEFAULT_SECONDS = 25.0
"""How long processes wait for each other at the start; starting torch comes on top."""
# For what is asked of the store when all are there, such as new groups.
_LATER = timedelta(minutes=30)


class RendezvousError(RuntimeError):
    """The processes of a run did not find each other; the message says who or what is wrong."""


def meet(
    *, address: str, port: int, rank: int, world_size: int, seconds: float = DEFAULT_SECONDS
) -> Store:
    """Wait until all processes of a run are there, and agree with them that it is the same run.

    Args:
        address: Host of rank 0.
        port: Where rank 0 listens.
        rank: Of this process.
        world_size: Processes in all.
        seconds: How long to wait for the others.

    Returns:
        The store they share.

    Raises:
        RendezvousError: If rank 0 cannot be reached, its port is taken, ranks are missing or there
            twice, or sizes or versions differ; the message says which.
    """
    ends = time.monotonic() + seconds
    where = f"{address}:{port}"
    store = _open_store(address, port, rank, seconds)
    mine = {"world_size": world_size, "lme-parallel": __version__, "torch": torch.__version__}
    if rank == 0:
        store.set("run", json.dumps(mine))
    _compare(mine, json.loads(_get(store, "run", ends, where)), rank)
    host = f"{socket.gethostname()} (process {os.getpid()})"
    if store.add(f"count/{rank}", 1) > 1:
        other = store.get(f"host/{rank}").decode()
        raise RendezvousError(
            f"rank {rank} exists twice, on {other} and on {host}; give each process its own `RANK`,"
            f" or another run uses {where}: set `MASTER_PORT`"
        )
    store.set(f"host/{rank}", host)
    if store.add("joined", 1) == world_size:
        store.set("complete", "1")
    if not _wait(store, "complete", ends):
        missing = _missing(store, world_size)
        listed = ", ".join(map(str, missing[:8])) + (" and more" if len(missing) > 8 else "")
        raise RendezvousError(
            f"{world_size - len(missing)} of {world_size} processes met at {where} within"
            f" {seconds:.0f} seconds; missing: rank {listed}. Start them, or correct `WORLD_SIZE`;"
            " where they start slowly, raise `distributed_args.timeout_minutes`"
        )
    store.set_timeout(_LATER)
    return store


def _open_store(address: str, port: int, rank: int, seconds: float) -> Store:
    # torchrun listens there itself.
    hosts = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        store = TCPStore(
            address,
            port,
            is_master=hosts,
            timeout=timedelta(seconds=seconds),
            wait_for_workers=False,
        )
    except (RuntimeError, ValueError) as error:
        if hosts:
            raise RendezvousError(
                f"rank 0 cannot listen on {address}:{port}, which may be in use; set `MASTER_PORT`"
                f" to a free port for all processes: {_first_line(error)}"
            ) from error
        raise RendezvousError(
            f"rank {rank} cannot reach rank 0 at {address}:{port} within {seconds:.0f} seconds; is"
            f" it running, and are `MASTER_ADDR` and `MASTER_PORT` right? {_first_line(error)}"
        ) from error
    # torchrun's store outlives the processes that it restarts.
    return PrefixStore(f"lme/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _compare(mine: dict[str, object], first: dict[str, object], rank: int) -> None:
    names = {
        "world_size": "`WORLD_SIZE`",
        "lme-parallel": "the version of lme-parallel",
        "torch": "the version of torch",
    }
    for name, title in names.items():
        if mine[name] != first[name]:
            raise RendezvousError(
                f"{title} is {mine[name]} for rank {rank}, but {first[name]} for rank 0; it must"
                " be the same everywhere"
            )


def _get(store: Store, key: str, ends: float, where: str) -> bytes:
    if not _wait(store, key, ends):
        raise RendezvousError(
            f"{where} answers, but rank 0 of this run is not there; is it running, or does another"
            " program use that port? Set `MASTER_PORT` to a free one for all processes"
        )
    return store.get(key)


def _wait(store: Store, key: str, ends: float) -> bool:
    try:
        store.wait([key], timedelta(seconds=max(0.05, ends - time.monotonic())))
    except RuntimeError:
        return False
    return True


def _missing(store: Store, world_size: int) -> list[int]:
    try:
        return [each for each in range(world_size) if not store.check([f"host/{each}"])]
    except RuntimeError:
        # It was there, or nobody would have come this far; it gave up a moment ago.
        return [0]


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
