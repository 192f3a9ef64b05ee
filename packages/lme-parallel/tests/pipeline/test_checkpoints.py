"""A checkpoint of stages is read whole, and one of anything else is read by stages."""

from dataclasses import dataclass

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

PIPELINE = {"pipeline_parallel_world_size": 2, "pipeline_parallel_schedule": "1F1B"}
WHOLE = {"stage": 0, "fsdp_algorithm": None}
SINGLE = ({}, 1)
LAYOUTS = {
    "stages": ({**WHOLE, **PIPELINE, "num_pipeline_stages": 2}, 2),
    "stages there and back": (
        {**PIPELINE, "pipeline_parallel_schedule": "ZBVZeroBubble", "num_pipeline_stages": 4},
        2,
    ),
    "shards of stages": ({"stage": 3, **PIPELINE, "num_pipeline_stages": 4}, 4),
}
OPTIONS = {"layers": 5, "is_tied": True, "dropout": 0.2}
BATCHES = 4
"""Micro batches of a step over all replicas."""


@dataclass
class State:
    step: int = 0
    tokens: int = 0


def train(settings, folder, steps, options=OPTIONS):
    """Restore, go on to `steps` and save there; return what is here before and after."""
    runtime, topology = tiny_runtime(settings, "torch.float64", options)
    optimizer = AdamW(runtime.named_parameters().values(), lr=1e-2, weight_decay=0.1)
    state = State()
    checkpointer = Checkpointer(
        SaveArgs(save_path=folder, save_interval=1),
        parameters=runtime.named_parameters(),
        buffers=runtime.named_buffers(),
        optimizer=optimizer,
        stateful={"runtime": runtime},
        documents={"config.json": {}},
        topology=topology,
        shards=runtime.shards(),
        after_restore=runtime.finish_step,
    )
    checkpointer.restore(state)
    restored = collect(runtime)
    while state.step < steps:
        batches = rank_batches(topology, state.step, BATCHES // topology.data_world_size)
        runtime.forward_backward(TinyObjective(), batches)
        runtime.clip_gradients(0.5)
        optimizer.step()
        runtime.finish_step()
        state.step += 1
    checkpointer.save(state)
    checkpointer.wait()
    return {"restored": restored, "final": collect(runtime)}


def run(layout, folder, steps):
    settings, size = layout
    if size == 1:
        return [train(settings, str(folder), steps)]
    return run_distributed(train, size, settings, str(folder), steps)


@pytest.fixture(scope="module")
def straight(fast_root):
    """The run that was never stopped, in one process."""
    return assemble([run(SINGLE, fast_root / "straight-stages", 6)[0]["final"]])[0]


def test_a_run_goes_through_every_layout(fast_path, straight):
    saved = None
    parts = (SINGLE, *LAYOUTS.values(), SINGLE)
    for steps, layout in enumerate(parts, start=2):
        ranks = run(layout, fast_path / "run", steps)
        restored, is_same = assemble([each["restored"] for each in ranks])
        assert is_same
        if saved is not None:
            assert restored.keys() == saved.keys()
            assert all(torch.equal(restored[each], saved[each]) for each in saved)
        saved, is_same = assemble([each["final"] for each in ranks])
        assert is_same
    # Sums over processes are taken in another order.
    assert max(relative(saved[each], straight[each]) for each in straight) < 1e-10
    names = Checkpoint(fast_path / "run" / f"global_step{len(parts) + 1}").names("model")
    assert set(names) >= set(straight)


def test_a_model_of_other_layers_is_refused_in_every_stage(fast_path):
    run(LAYOUTS["stages"], fast_path / "run", 1)
    words = r"it has besides .*blocks\.4|it lacks"
    with pytest.raises(RuntimeError, match=words):
        run_distributed(
            train, 2, LAYOUTS["stages"][0], str(fast_path / "run"), 2, {**OPTIONS, "layers": 4}
        )
    with pytest.raises(CheckpointError, match=words):
        train({}, str(fast_path / "run"), 2, {**OPTIONS, "layers": 4})
