import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from lme_parallel import rendezvous
from lme_parallel.rendezvous import RendezvousError, meet


@pytest.fixture
def port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def gather(port, members, seconds=2.0):
    """Let ranks meet, each in a thread; return what each got, an error or its store."""

    def join(member):
        rank, world_size = member
        try:
            return meet(
                address="127.0.0.1", port=port, rank=rank, world_size=world_size, seconds=seconds
            )
        except RendezvousError as error:
            return error

    with ThreadPoolExecutor(len(members)) as pool:
        return list(pool.map(join, members))


def test_processes_meet_and_share_a_store(port):
    stores = gather(port, [(0, 3), (1, 3), (2, 3)], seconds=20)
    stores[2].set("a", "value")
    assert stores[0].get("a") == b"value"


def test_who_is_missing_is_named_in_time(port):
    started = time.monotonic()
    found = gather(port, [(0, 4), (2, 4)], seconds=1.5)
    assert time.monotonic() - started < 10
    for error in found:
        assert "2 of 4 processes met" in str(error)
        assert "missing: rank 1, 3." in str(error)


def test_another_world_size_is_named(port):
    found = gather(port, [(0, 2), (1, 3)], seconds=1.5)
    assert "`WORLD_SIZE` is 3 for rank 1, but 2 for rank 0" in str(found[1])


def test_a_rank_that_exists_twice_is_named(port):
    found = gather(port, [(0, 3), (1, 3), (1, 3)], seconds=1.5)
    assert sum("rank 1 exists twice" in str(error) for error in found) == 1


def test_another_version_is_named(port, monkeypatch):
    store = gather(port, [(0, 1)])[0]
    monkeypatch.setattr(rendezvous, "__version__", "0.0.1")
    error = gather(port, [(1, 1)])[0]
    assert "the version of lme-parallel is 0.0.1 for rank 1" in str(error)
    del store


def test_a_port_in_use_is_named(port):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        error = gather(port, [(0, 2)], seconds=1.5)[0]
    assert f"rank 0 cannot listen on 127.0.0.1:{port}" in str(error)


def test_rank_0_that_is_not_there_is_named(port):
    started = time.monotonic()
    error = gather(port, [(1, 2)], seconds=1.5)[0]
    assert f"rank 1 cannot reach rank 0 at 127.0.0.1:{port}" in str(error)
    assert time.monotonic() - started < 10


def test_processes_that_torchrun_restarted_meet_again(port, monkeypatch):
    first = gather(port, [(0, 1)])[0]
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    again = gather(port, [(0, 1)])[0]
    assert not isinstance(again, RendezvousError)
    del first
