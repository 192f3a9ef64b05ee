"""A checkpoint of divided experts is read by any layout, and any other by one that divides them."""

from dataclasses import dataclass

import pytest
import torch
from torch.optim import AdamW

from lme_parallel.checkpoint.args import SaveArgs
from lme_parallel.checkpoint.checkpointer import Checkpointer
from lme_parallel.checkpoint.reader import Checkpoint
from lme_parallel.equality import assemble, collect, rank_batches, relative, tiny_runtime
from lme_parallel.testing import run_distributed
from lme_parallel.tiny_run import TinyObjective

OPTIONS = {"experts": 6, "dropout": 0.2}
TWO = {"expert_parallel_world_size": 2}
LAYOUTS = {
    "single": ({}, 1),
    "shards 2, experts 2": ({**TWO, "stage": 3}, 4),
    "DDP, experts 2": ({**TWO, "stage": 0, "fsdp_algorithm": None}, 2),
    "tensor 2, experts 2": ({**TWO, "tensor_parallel_world_size": 2, "stage": 1}, 4),
    "shards 3": ({"stage": 3}, 3),
    "experts 3": ({"expert_parallel_world_size": 3, "stage": 2}, 3),
    "hybrid, experts 2": (
        {
            **TWO,
            "stage": 3,
            "zero_topology": {
                "data_parallel_replication_world_size": 2,
                "data_parallel_sharding_world_size": 2,
            },
        },
        4,
    ),
}
GLOBAL_BATCHES = 12
"""Micro batches of a step over all ranks: divides by every number of ranks here."""


@dataclass
class State:
    step: int = 0
    tokens: int = 0


def train(settings, folder, steps, save):
    """Restore, go on to `steps` and perhaps save; return what is here then."""
    runtime, topology = tiny_runtime(settings, "torch.float64", OPTIONS)
    optimizer = AdamW(runtime.named_parameters().values(), lr=1e-2, weight_decay=0.1)
    state = State()
    checkpointer = Checkpointer(
        SaveArgs(save_path=folder, save_interval=1),
        parameters=runtime.named_parameters(),
        buffers=runtime.named_buffers(),
        optimizer=optimizer,
        stateful={},
        documents={"config.json": {}},
        topology=topology,
        shards=runtime.shards(),
        after_restore=runtime.finish_step,
    )
    checkpointer.restore(state)
    restored = collect(runtime)
    for step in range(state.step, steps):
        batches = rank_batches(topology, step, GLOBAL_BATCHES // topology.data_world_size)
        runtime.forward_backward(TinyObjective(), batches)
        runtime.clip_gradients(0.5)
        optimizer.step()
        runtime.finish_step()
        state.step += 1
    if save:
        checkpointer.save(state)
    checkpointer.wait()
    return {"restored": restored, "final": collect(runtime)}


def run(name, folder, steps, *, save=False):
    settings, size = LAYOUTS[name]
    if size == 1:
        return [train(settings, str(folder), steps, save)]
    return run_distributed(train, size, settings, str(folder), steps, save)


def test_a_run_goes_from_layout_to_layout(fast_path):
    folder, expected = fast_path / "run", None
    for step, name in enumerate([*LAYOUTS, "single"], start=1):
        ranks = run(name, folder, step, save=True)
        restored, is_same = assemble([each["restored"] for each in ranks])
        assert is_same
        if expected is not None:
            assert all(torch.equal(restored[each], expected[each]) for each in expected), name
        expected, is_same = assemble([each["final"] for each in ranks])
        assert is_same
        Checkpoint(folder / f"global_step{step}").verify()
    (straight,) = run("single", fast_path / "straight", step)
    straight, _ = assemble([straight["final"]])
    # Sums over ranks are taken in another order.
    assert max(relative(expected[each], straight[each]) for each in straight) < 1e-10


@pytest.mark.parametrize(
    ("name", "chunks"),
    # Of 6 experts each of two processes has 3, of which each of two holds 2 and 1.
    [("shards 2, experts 2", (1, 24, 8)), ("DDP, experts 2", (3, 24, 8))],
)
def test_a_process_writes_its_experts_alone(name, chunks, fast_path):
    run(name, fast_path / "run", 1, save=True)
    checkpoint = Checkpoint(fast_path / "run" / "global_step1")
    checkpoint.verify()
    for each in ("model/blocks.0.mlp.experts.gate_up.weight", "optimizer/{}.exp_avg"):
        full = each.format("blocks.0.mlp.experts.gate_up.weight")
        assert checkpoint.layout(full).shape == (6, 24, 8)
        assert checkpoint.layout(full).chunks == chunks
