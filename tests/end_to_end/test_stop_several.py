"""Several processes asked to stop, in any way and through any of them, save and go on alike."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lme_parallel.testing import run_distributed

RUN = """
datasets:
  - class_name: DebugDataset
    data_name: debug
    class_args: {{num_examples: 64, sequence_length: 16, static_examples: false}}
model_args:
  pretrained_config:
    model_type: gpt_base
    vocab_size: 64
    hidden_size: 16
    num_layers: 1
    embedding_dropout: 0.1
    sequence_mixer_blocks: [{{num_attention_heads: 2, num_key_value_heads: 1}}]
    mlp_blocks: [{{activation_function: swiglu, intermediate_size: 32}}]
tuning_args: {{tuning_method: pretraining}}
training_parameters:
  num_training_steps: {steps}
  micro_batch_size: 1
  global_batch_size: 4
  eval_during_training: false
  stop_after_seconds: {seconds}
# Of no other length than a straight run's; the rate is low, so that sums in another order stay close.
lr_scheduler_args: {{num_warmup_steps: 2, lr_decay_style: constant}}
optimizer_args: {{class_name: TorchSGD, class_args: {{lr: 0.01}}}}
logging_args: {{log_interval: 1}}
distributed_args: {{stage: 3}}
save_args: {{save_path: {run}, save_interval: 1000000}}
"""


def write_run(folder, *, steps=1_000_000, seconds="null"):
    file = folder / "run.yml"
    file.write_text(RUN.format(run=folder / "run", steps=steps, seconds=seconds))
    return file


def train(file, kill_switch_at=None, signal_at=None):
    """Train as the command would in the processes of this group; return how it ended."""
    from torch import distributed

    from lme_cli.compose import compose
    from lme_cli.loading import load_run
    from lme_cli.planning import make_plan

    loaded = load_run(Path(file))
    plan = make_plan(loaded.run)
    kill_switch = plan.save_path / "KILLSWITCH"

    def ask(state, report):
        """Before the hook that listens: the last process alone is asked to stop."""
        if plan.launch.rank == plan.launch.world_size - 1:
            if state.step == kill_switch_at:
                kill_switch.touch()
            if state.step == signal_at:
                os.kill(os.getpid(), signal.SIGTERM)

    run = compose(plan, loaded.run_file, first_hooks=[ask])
    try:
        run.trainer.fit(run.state)
    finally:
        run.trackers.finish()
    if distributed.is_initialized():
        distributed.barrier()
    kill_switch.unlink(missing_ok=True)
    return [run.state.step, run.state.stop_reason]


def train_in_parts(folder, start):
    """Four parts of a run in one group: a signal, a budget, a file, and to the end."""
    folder = Path(folder)
    return [
        train(write_run_once(folder), signal_at=start + 2),
        train(write_run_once(folder, seconds=0.001)),
        train(write_run_once(folder), kill_switch_at=start + 5),
        train(write_run_once(folder, steps=start + 7)),
    ]


def write_run_once(folder, **settings):
    """The file of all processes, written by each with the same content."""
    from torch import distributed

    distributed.barrier()
    if distributed.get_rank() == 0:
        write_run(folder, **settings)
    distributed.barrier()
    return folder / "run.yml"


def start(file):
    """Start two processes through the command; return it once they are at work, and their ids."""
    process = subprocess.Popen(
        [sys.executable, "-m", "lme_cli", "train", str(file), "--nproc", "2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    steps = 0
    for line in process.stdout:
        steps += line.startswith("[rank 0] step ")
        if steps == 2:
            break
    assert steps == 2, process.communicate()[1]
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return process, [int(each) for each in children]


def saved_steps(run):
    steps = sorted(int(each.name.removeprefix("global_step")) for each in run.glob("global_step*"))
    assert all((run / f"global_step{step}/COMMIT").exists() for step in steps)
    pointer = json.loads((run / "latest_checkpointed_iteration.json").read_text())
    assert pointer == {"latest_checkpointed_iteration": steps[-1]}
    return steps


def values(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [[row[name] for name in ("step", "tokens", "loss", "grad_norm")] for row in rows]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds processes in /proc")
def test_several_processes_stopped_in_every_way_are_one_straight_run(tmp_path):
    file, run = write_run(tmp_path), tmp_path / "run"
    process, workers = start(file)
    assert len(workers) == 2
    # As a scheduler that signals the launcher, which passes it on, and its processes too.
    for each in (process.pid, *workers):
        os.kill(each, signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "a signal asked for it; saved, the same command continues" in out
    (first,) = saved_steps(run)
    ranks = run_distributed(train_in_parts, 2, str(tmp_path), first)
    assert ranks[0] == ranks[1]
    assert ranks[0] == [
        [first + 2, "a signal asked for it"],
        [first + 3, "`training_parameters.stop_after_seconds` is 0.001"],
        [first + 5, f"{run}/KILLSWITCH exists (remove it before the next start)"],
        [first + 7, None],
    ]
    assert saved_steps(run) == [first, first + 2, first + 3, first + 5, first + 7]
    # The same steps in one process that nobody stopped.
    (tmp_path / "straight").mkdir()
    straight = write_run(tmp_path / "straight", steps=first + 7)
    assert run_distributed(train, 1, str(straight)) == [[first + 7, None]]
    found, expected = values(run), values(tmp_path / "straight/run")
    assert [row[:2] for row in found] == [row[:2] for row in expected]
    for row, other in zip(found, expected, strict=True):
        # fp32, summed in another order, over as many steps as passed before the signals came.
        assert row[2:] == pytest.approx(other[2:], rel=2e-5)
