"""A stage that hangs is named, and objectives that a pipeline cannot serve are too."""

import re
import time
from pathlib import Path

import pytest
from torch import distributed
from torch.distributed import FileStore

from lme_parallel.equality import rank_batches, tiny_runtime
from lme_parallel.testing import run_distributed, run_until_ended
from lme_parallel.tiny_run import TinyObjective
from lme_parallel.watchdog.watchdog import Watchdog

SETTINGS = {
    "stage": 0,
    "fsdp_algorithm": None,
    "pipeline_parallel_world_size": 2,
    "num_pipeline_stages": 2,
    "pipeline_parallel_schedule": "1F1B",
}


class Sleepy(TinyObjective):
    """Sleeps in a stage, the second time that it is called."""

    def __init__(self):
        self.calls = 0

    def forward(self, model, batch):
        self.calls += 1
        if self.calls == 2:
            time.sleep(60)
        return model(batch)


def hang(folder, guilty):
    rank = distributed.get_rank()
    runtime, topology = tiny_runtime(SETTINGS, "torch.float64", {})
    watchdog = Watchdog(
        FileStore(str(Path(folder) / "store"), 2),
        rank=rank,
        world_size=2,
        seconds=1.0,
        folder=Path(folder) / "stacks",
        say=(Path(folder) / f"said-{rank}").write_text,
    )
    with watchdog:
        runtime.mark = watchdog.mark
        runtime.forward_backward(
            Sleepy() if rank == guilty else TinyObjective(), rank_batches(topology, 0, 4)
        )


@pytest.mark.parametrize("guilty", [0, 1])
def test_the_process_whose_stage_hangs_is_named(guilty, fast_path):
    codes = run_until_ended(hang, 2, str(fast_path), guilty)
    assert all(code not in (0, None) for code in codes)
    (said,) = [file.read_text() for file in fast_path.glob("said-*")]
    assert re.match(rf"rank {guilty} has been in forward at \S*test_faults\.py", said), said
    assert f"rank {1 - guilty} waits" in said


class Twice(TinyObjective):
    def forward(self, model, batch):
        model(batch)
        return model(batch)


class Never(TinyObjective):
    def forward(self, model, batch):
        return None

    def loss(self, outputs, batch):
        return self.counts(batch)


def message(runtime, objective, batches):
    with pytest.raises(ValueError, match=r"\w") as caught:
        runtime.forward_backward(objective, batches)
    return str(caught.value)


def refuse():
    runtime, topology = tiny_runtime(SETTINGS, "torch.float64", {})
    # In the first stage only: the other one would wait for it.
    objectives = (Twice(), Never()) if topology.rank == 0 else ()
    said = [message(runtime, each, rank_batches(topology, 0, 1)) for each in objectives]
    dual = {**SETTINGS, "num_pipeline_stages": 4, "pipeline_parallel_schedule": "DualPipeV"}
    runtime, _ = tiny_runtime(dual, "torch.float64", {"layers": 4})
    return [*said, message(runtime, TinyObjective(), rank_batches(topology, 0, 3))]


def test_objectives_and_micro_batches_that_do_not_fit_are_named():
    (twice, never, few), (other,) = run_distributed(refuse, 2)
    assert few == other
    assert "call the model once a micro batch" in twice
    assert "must call the model" in never
    assert "got 3; set `gradient_accumulation_steps` to 4" in few
