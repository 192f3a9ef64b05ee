"""A checkpoint of any layout is read by any other, and continues as if nothing had changed."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch.optim import AdamW

from lme_parallel.checkpoint.args import SaveArgs
from lme_parallel.checkpoint.checkpointer import Checkpointer
from lme_parallel.checkpoint.errors import CheckpointError
from lme_parallel.checkpoint.reader import Checkpoint
from lme_parallel.equality import assemble, collect, rank_batches, relative, tiny_runtime
from lme_parallel.testing import run_distributed
from lme_parallel.tiny_run import TinyObjective

SINGLE = ({}, 1)
LAYOUTS = {
    "single": SINGLE,
    "stage 3 of 4": ({"stage": 3}, 4),
    "stage 2 of 2": ({"stage": 2}, 2),
    "stage 1 of 3": ({"stage": 1}, 3),
    "stage 0 of 2": ({"stage": 0}, 2),
    "hybrid of 4": (
        {
            "stage": 3,
            "zero_topology": {
                "data_parallel_replication_world_size": 2,
                "data_parallel_sharding_world_size": 2,
            },
        },
        4,
    ),
    "FSDP 1 of 4": ({"stage": 3, "fsdp_algorithm": 1}, 4),
    "DDP of 2": ({"stage": 0, "fsdp_algorithm": None}, 2),
    "tensor 2": ({"tensor_parallel_world_size": 2}, 2),
    "context 2": (
        {"context_parallel_world_size": 2, "context_parallel_load_balancing_method": "headtail"},
        2,
    ),
    "shards 2 tensor 2": ({"tensor_parallel_world_size": 2, "sequence_parallel": True}, 4),
}
GLOBAL_BATCHES = 12
"""Micro batches of a step over all ranks: divides by every number of ranks here."""


@dataclass
class State:
    step: int = 0
    tokens: int = 0


class Position:
    """As a loader has it: the same on every rank."""

    def __init__(self):
        self.samples = 0

    def state_dict(self):
        return {"samples": self.samples}

    def load_state_dict(self, state):
        self.samples = state["samples"]


def train(settings, folder, steps, *, is_async=False, save_at=()):
    """Restore, go on to `steps`, save at some of them; return what is here then."""
    runtime, topology = tiny_runtime(settings, "torch.float64", {"dropout": 0.2})
    optimizer = AdamW(runtime.named_parameters().values(), lr=1e-2, weight_decay=0.1)
    position, state = Position(), State()
    checkpointer = Checkpointer(
        SaveArgs(save_path=folder, save_interval=1, async_checkpointing=is_async, keep_last=2),
        parameters=runtime.named_parameters(),
        buffers=runtime.named_buffers(),
        optimizer=optimizer,
        stateful={"loader": position, "runtime": runtime},
        documents={"config.json": {}},
        topology=topology,
        shards=runtime.shards(),
        after_restore=runtime.finish_step,
    )
    checkpointer.restore(state)
    restored = collect(runtime)
    accumulation = GLOBAL_BATCHES // topology.data_world_size
    while state.step < steps:
        # The position decides what is read.
        assert position.samples == state.step * GLOBAL_BATCHES
        batches = rank_batches(topology, state.step, accumulation)
        runtime.forward_backward(TinyObjective(), batches)
        runtime.clip_gradients(0.5)
        optimizer.step()
        runtime.finish_step()
        state.step += 1
        position.samples += GLOBAL_BATCHES
        if state.step in save_at:
            checkpointer.save(state)
    checkpointer.wait()
    return {"restored": restored, "final": collect(runtime)}


def run(layout, folder, steps, **options):
    settings, size = layout
    arguments = (settings, str(folder), steps)
    if size == 1:
        return [train(*arguments, **options)]
    return run_distributed(run_train, size, arguments, options)


def run_train(arguments, options):
    return train(*arguments, **options)


def run_all(plans):
    """What each process has at the end of each plan; those of as many processes share a group.

    Args:
        plans: By name: layout, folder, steps, further options of `train`.
    """
    found = {}
    for size in sorted({layout[1] for layout, *_ in plans.values()}):
        calls = {
            name: ((layout[0], str(folder), steps), options)
            for name, (layout, folder, steps, options) in plans.items()
            if layout[1] == size
        }
        if size == 1:
            ranks = [train_all(calls)]
        else:
            ranks = run_distributed(train_all, size, calls, timeout_seconds=400)
        found |= {name: [each[name] for each in ranks] for name in calls}
    return found


def train_all(calls):
    return {name: run_train(*call) for name, call in calls.items()}


@pytest.fixture(scope="module")
def straight(fast_root):
    """The run that was never stopped, in one process."""
    ranks = run(SINGLE, fast_root / "straight-layouts", 4)
    return assemble([each["final"] for each in ranks])[0]


@pytest.fixture(scope="module")
def saved(fast_root):
    """Each layout's own two steps, saved one by one."""
    return run_all(
        {
            name: (
                layout,
                fast_root / "saved" / name,
                2,
                {"save_at": (1, 2), "is_async": name.startswith("stage 3")},
            )
            for name, layout in LAYOUTS.items()
        }
    )


def others(name):
    """Each goes to the next, and all to one process."""
    names = list(LAYOUTS)
    return {names[(names.index(name) + 1) % len(names)], "single"}


@pytest.fixture(scope="module")
def continued(fast_root, saved):
    """What was saved, in other layouts for two more steps."""
    return run_all(
        {
            f"{name} to {other}": (LAYOUTS[other], fast_root / "saved" / name, 4, {})
            for name in saved
            for other in others(name)
        }
    )


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_run_goes_on_in_every_other_layout(name, saved, continued, straight):
    expected, is_same = assemble([each["final"] for each in saved[name]])
    assert is_same
    for other in others(name):
        ranks = continued[f"{name} to {other}"]
        restored, is_same = assemble([each["restored"] for each in ranks])
        assert is_same
        assert all(torch.equal(restored[each], expected[each]) for each in expected)
        final, is_same = assemble([each["final"] for each in ranks])
        assert is_same
        # Sums over ranks are taken in another order.
        assert max(relative(final[each], straight[each]) for each in straight) < 1e-10


def test_every_chunk_has_one_writer_and_lies_in_one_shard(fast_path):
    run(({"stage": 3}, 4), fast_path / "run", 1, save_at=(1,))
    checkpoint = Checkpoint(fast_path / "run" / "global_step1")
    checkpoint.verify()
    # 19 rows over 4 ranks are 5, 5, 5 and 4.
    assert checkpoint.layout("model/embedding.weight").chunks == (5, 8)
    assert checkpoint.layout("optimizer/embedding.weight.exp_avg").chunks == (5, 8)
    assert checkpoint.layout("optimizer/embedding.weight.step").shape == ()
    assert checkpoint.document("state.json")["mesh"]["shard"] == 4


def fail_on_rank(folder, failing):
    """Save with one rank's disk failing; return what each rank is told and what is left."""
    runtime, topology = tiny_runtime({"stage": 3}, "torch.float32", {})

    def point(name):
        if topology.rank == failing and name.startswith("open model/blocks.1"):
            raise OSError(28, "No space left on device")

    checkpointer = Checkpointer(
        SaveArgs(save_path=folder, save_interval=1),
        parameters=runtime.named_parameters(),
        buffers={},
        optimizer=None,
        stateful={},
        documents={},
        topology=topology,
        shards=runtime.shards(),
        point=point,
    )
    with pytest.raises(CheckpointError) as caught:
        checkpointer.save(State(step=1))
    return str(caught.value)


@pytest.mark.parametrize("failing", [0, 1])
def test_all_ranks_learn_that_one_could_not_write(failing, fast_path):
    messages = run_distributed(fail_on_rank, 2, str(fast_path / "run"), failing)
    for rank, message in enumerate(messages):
        assert "step 1 was not saved" in message
        assert "No space left on device" in message
        assert (f"rank {failing}: " in message) == (rank != failing)
    assert list(Path(fast_path / "run").iterdir()) == []


def damage_and_restore(folder):
    """Save twice, damage one chunk of the second, restore on all ranks."""
    train({"stage": 3}, folder, 2, save_at=(1, 2))
    torch.distributed.barrier()
    if torch.distributed.get_rank() == 0:
        chunk = Path(folder) / "global_step2/model/lm_head.weight/c/1/0"
        content = bytearray(chunk.read_bytes())
        content[0] ^= 1
        chunk.write_bytes(content)
    torch.distributed.barrier()
    runtime, topology = tiny_runtime({"stage": 3}, "torch.float64", {"dropout": 0.2})
    state = State()
    checkpointer = Checkpointer(
        SaveArgs(save_path=folder, save_interval=1),
        parameters=runtime.named_parameters(),
        buffers=runtime.named_buffers(),
        optimizer=AdamW(runtime.named_parameters().values()),
        stateful={},
        documents={},
        topology=topology,
        shards=runtime.shards(),
    )
    return [checkpointer.restore(state), state.step]


def test_what_one_rank_cannot_read_no_rank_uses(fast_path):
    # Only rank 1 reads the damaged chunk.
    assert run_distributed(damage_and_restore, 2, str(fast_path / "run")) == [[1, 1], [1, 1]]
