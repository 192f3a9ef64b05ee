import shutil
import threading
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from lme_parallel.args import DistributedArgs
from lme_parallel.checkpoint.args import SaveArgs
from lme_parallel.checkpoint.checkpointer import Checkpointer
from lme_parallel.checkpoint.errors import CheckpointError
from lme_parallel.checkpoint.layout import checkpoint_steps
from lme_parallel.checkpoint.reader import newest_valid
from lme_parallel.checkpoint.unshard import iterate_tensors
from lme_parallel.testing import run_distributed
from lme_parallel.topology import Topology


@dataclass
class State:
    step: int = 1
    tokens: int = 0


class Gate:
    """Holds the writer before its first step until it is opened, or makes it fail."""

    def __init__(self):
        self.opened = threading.Event()
        self.reached = threading.Event()
        self.error = None

    def __call__(self, name):
        self.reached.set()
        assert self.opened.wait(60)
        if self.error is not None:
            error, self.error = self.error, None
            raise error


def make(folder, parameters, point=None, optimizer=None, **args):
    return Checkpointer(
        SaveArgs(save_path=str(folder), save_interval=1, async_checkpointing=True, **args),
        parameters=parameters,
        buffers={},
        optimizer=optimizer,
        stateful={},
        documents={},
        topology=Topology.from_args(DistributedArgs(), 1, 0),
        point=point,
    )


def value_of(checkpoint):
    return dict(iterate_tensors(checkpoint))["weight"]


def test_what_is_saved_is_the_moment_of_the_call(fast_path):
    gate = Gate()
    weight = torch.nn.Parameter(torch.ones(1000))
    checkpointer = make(fast_path, {"weight": weight}, gate)
    checkpointer.save(State())
    assert gate.reached.wait(60)
    assert newest_valid(fast_path) is None
    with torch.no_grad():
        weight.fill_(2.0)
    gate.opened.set()
    checkpointer.wait()
    assert torch.equal(value_of(fast_path), torch.ones(1000))


def test_a_second_save_waits_for_the_first(fast_path):
    gate = Gate()
    weight = torch.nn.Parameter(torch.ones(3))
    checkpointer = make(fast_path, {"weight": weight}, gate)
    checkpointer.save(State(1))
    assert gate.reached.wait(60)
    second = threading.Thread(target=checkpointer.save, args=(State(2),))
    second.start()
    second.join(0.2)
    assert second.is_alive()
    # The first one's buffer was not touched meanwhile.
    gate.opened.set()
    second.join(60)
    checkpointer.wait()
    assert checkpoint_steps(fast_path) == [1, 2]


@pytest.mark.parametrize("way", ["check", "wait", "save"])
def test_a_failure_surfaces_once_at_the_next_call(way, fast_path):
    gate = Gate()
    gate.error = OSError(5, "Input/output error")
    checkpointer = make(fast_path, {"weight": torch.nn.Parameter(torch.ones(3))}, gate)
    checkpointer.save(State(1))
    # Nothing went wrong yet.
    checkpointer.check()
    gate.opened.set()
    for thread in threading.enumerate():
        if thread.name == "save step 1":
            thread.join(60)
    call = {"check": checkpointer.check, "wait": checkpointer.wait}.get(way)
    with pytest.raises(CheckpointError, match=r"step 1 was not saved.*Input/output error"):
        checkpointer.save(State(2)) if call is None else call()
    assert checkpoint_steps(fast_path) == []
    # The run may go on, and the next save is whole.
    checkpointer.check()
    checkpointer.save(State(2))
    checkpointer.wait()
    assert newest_valid(fast_path).step == 2


def test_the_buffer_is_allocated_at_the_start_and_fits_adamw(fast_path):
    weight = torch.nn.Parameter(torch.randn(100, 7))
    optimizer = torch.optim.AdamW([weight])
    checkpointer = make(fast_path, {"weight": weight}, optimizer=optimizer)
    size = checkpointer.buffer_bytes
    assert size >= 3 * weight.numel() * 4 + 4
    weight.sum().backward()
    optimizer.step()
    checkpointer.save(State())
    checkpointer.wait()
    assert checkpointer.buffer_bytes == size


def test_the_buffer_grows_once_for_an_optimizer_with_more_state(fast_path):
    weight = torch.nn.Parameter(torch.randn(100, 7))
    optimizer = torch.optim.AdamW([weight], amsgrad=True)
    checkpointer = make(fast_path, {"weight": weight}, optimizer=optimizer)
    sizes = [checkpointer.buffer_bytes]
    for step in range(1, 4):
        weight.sum().backward()
        optimizer.step()
        checkpointer.save(State(step))
        checkpointer.wait()
        sizes.append(checkpointer.buffer_bytes)
    assert sizes[0] < sizes[1] == sizes[2] == sizes[3]
    assert torch.equal(value_of(fast_path), weight.detach())


def resident_bytes():
    """Anonymous memory of this process: files in the page cache do not count."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no RssAnon")


def grow_over_saves(folder, saves):
    # 100 MB a save, in two chunks.
    parameters = {"weight": torch.nn.Parameter(torch.zeros(5000, 5000))}
    checkpointer = make(folder, parameters, keep_last=1)
    for step in range(1, 4):
        checkpointer.save(State(step))
    checkpointer.wait()
    before, most = resident_bytes(), 0
    for step in range(4, 4 + saves):
        checkpointer.save(State(step))
        checkpointer.check()
        most = max(most, resident_bytes())
    checkpointer.wait()
    return [resident_bytes() - before, most - before]


@pytest.fixture
def roomy_path(fast_path, tmp_path):
    """In memory if three checkpoints fit there: a disk would take minutes to write 20 GB."""
    return fast_path if shutil.disk_usage(fast_path).free > 2**30 else tmp_path


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_two_hundred_saves_of_100_mb_do_not_grow_the_process(roomy_path):
    arguments = (str(roomy_path), 200)
    ((grown, most),) = run_distributed(grow_over_saves, 1, *arguments, timeout_seconds=300)
    assert grown < 20 * 10**6
    # Two chunks under way with their checksums; neither the buffer nor the saves add up.
    assert most < 150 * 10**6
