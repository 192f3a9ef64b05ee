"""A run in several processes is the run in one, and any number of processes continues it."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from lme_cli.app import main
from lme_cli.evaluation import evaluate_checkpoint
from lme_data.writer import IndexedWriter
from lme_parallel.testing import run_distributed

STEPS = 6
HYBRID = {"data_parallel_replication_world_size": 2, "data_parallel_sharding_world_size": 2}
PIPELINE = {
    "pipeline_parallel_world_size": 2,
    "num_pipeline_stages": 2,
    "pipeline_parallel_schedule": "1F1B",
}
RUN = """
datasets:
  - class_name: MegatronDataset
    data_name: large
    data_sampling_ratio: 3
    class_args: {{data_path: [{folder}/large], split: "90,10,0", sequence_length: 16, eval_steps: 2}}
  - class_name: MegatronDataset
    data_name: small
    data_sampling_ratio: 1
    class_args: {{data_path: [{folder}/small], split: "90,10,0", sequence_length: 16, eval_steps: 2}}
model_args:
  pretrained_config:
    model_type: gpt_base
    vocab_size: 64
    hidden_size: 32
    num_layers: 2
    max_position_embeddings: 16
    position_embedding_type: rope
    embedding_dropout: 0.1
    eos_token_id: 0
    sequence_mixer_blocks:
      - {{num_attention_heads: 2, num_key_value_heads: 1, dropout: 0.1}}
    mlp_blocks:
      - {{activation_function: swiglu, intermediate_size: 64, dropout: 0.1}}
tuning_args: {{tuning_method: pretraining}}
training_parameters:
  num_training_steps: {steps}
  micro_batch_size: 2
  global_batch_size: 8
  eval_interval: 3
lr_scheduler_args: {{num_warmup_steps: 2, lr_decay_style: constant}}
# Adam would make whole steps of rounding errors where a gradient is zero.
optimizer_args: {{class_name: TorchSGD, class_args: {{lr: 0.05, momentum: 0.9}}}}
mixed_precision_args: {{dtype: {dtype}}}
logging_args: {{log_interval: 1}}
distributed_args: {distributed}
save_args: {{save_path: {run}, save_interval: 3}}
"""


class Stopper:
    """Asks all processes to stop, from the one that tracks."""

    def __init__(self, file, step):
        self.file = file
        self.step = step

    def log(self, record):
        if self.step is not None and record["step"] == self.step - 1:
            self.file.touch()

    def start(self, step):
        pass

    flush = finish = lambda self: None

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


def train(file, stop_at=None):
    """Train in the group that is there, as the command would in the same processes."""
    import torch

    from lme_cli.compose import compose
    from lme_cli.loading import load_run
    from lme_cli.planning import make_plan

    loaded = load_run(file)
    plan = make_plan(loaded.run)
    stopper = Stopper(plan.save_path / "KILLSWITCH", stop_at)
    run = compose(plan, loaded.run_file, trackers={"stopper": stopper})
    try:
        run.trainer.fit(run.state)
    finally:
        run.trackers.finish()
    assert torch.get_num_threads() == 1


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpora")
    random = np.random.default_rng(0)
    for name, documents in (("large", 120), ("small", 12)):
        with IndexedWriter(folder / name, np.dtype("uint16")) as writer:
            for _ in range(documents):
                ids = (random.integers(63) + np.arange(random.integers(5, 60))) % 63 + 1
                writer.add_document(np.append(ids, 0))
            writer.finalize()
    return folder


def write_run(folder, corpora, name, distributed, dtype="fp32"):
    file = folder / f"{name}.yml"
    text = RUN.format(
        folder=corpora,
        run=folder / name,
        steps=STEPS,
        dtype=dtype,
        distributed=json.dumps(distributed),
    )
    file.write_text(text)
    return file


def losses(run):
    """Loss and gradient norm by context, group and step."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {
        (row["context"], row["group"], row["step"], name): row[name]
        for row in rows
        for name in ("loss", "grad_norm", "tokens")
        if name in row
    }


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        # fp32 over six steps, summed in another order.
        assert found[key] == pytest.approx(value, rel=2e-6), key


@pytest.fixture(scope="module")
def straight(tmp_path_factory, corpora):
    folder = tmp_path_factory.mktemp("straight")
    run_distributed(train, 1, str(write_run(folder, corpora, "run", {})))
    found = losses(folder / "run")
    assert len([key for key in found if key[0] == "train"]) == 3 * STEPS
    assert {key[1] for key in found if key[0] == "val"} == {None, "large", "small"}
    return found


@pytest.mark.parametrize(
    ("distributed", "size"),
    [
        ({"stage": 3, "gradient_checkpointing_method": "block", "zero_topology": HYBRID}, 4),
        ({"stage": 2, "fsdp_algorithm": 1}, 2),
        ({"stage": 0, "fsdp_algorithm": None}, 2),
        ({"stage": 3, "context_parallel_world_size": 2}, 2),
    ],
    ids=["hybrid stage 3", "FSDP 1", "DDP", "context"],
)
def test_several_processes_train_as_one(distributed, size, corpora, straight, tmp_path):
    file = write_run(tmp_path, corpora, "run", distributed)
    run_distributed(train, size, str(file))
    found = losses(tmp_path / "run")
    assert_close(found, straight)
    # One process evaluates the same rows, without the layout.
    for record in evaluate_checkpoint(tmp_path / "run", [], ["val"]):
        key = ("val", record["group"], STEPS, "loss")
        assert record["loss"] == pytest.approx(found[key], rel=2e-6)


def test_bf16_shards_train_as_bf16_copies_of_one_process(corpora, tmp_path):
    runs = {"one": ({}, 1), "two": ({"stage": 3}, 2)}
    for name, (distributed, size) in runs.items():
        file = write_run(tmp_path, corpora, name, distributed, dtype="bf16")
        run_distributed(train, size, str(file))
    one, two = (losses(tmp_path / name) for name in runs)
    first = ("train", None, 1, "loss")
    # The same bf16 weights, and sums in fp32; later weights round apart now and then.
    assert two[first] == pytest.approx(one[first], rel=1e-6)
    assert all(two[key] == pytest.approx(one[key], rel=5e-3) for key in one if "loss" in key)


def test_any_number_of_processes_continues_a_run(corpora, straight, tmp_path):
    # 4 processes to step 3, 2 stages of a pipeline to step 5, one process to the end.
    parts = (({"stage": 3}, 4, 3), ({"stage": 1, **PIPELINE}, 2, 5), ({}, 1, None))
    for distributed, size, stop_at in parts:
        file = write_run(tmp_path, corpora, "run", distributed)
        run_distributed(train, size, str(file), stop_at)
        (tmp_path / "run/KILLSWITCH").unlink(missing_ok=True)
        saved = json.loads((tmp_path / "run/latest_checkpointed_iteration.json").read_text())
        assert saved["latest_checkpointed_iteration"] == (stop_at or STEPS)
    # One line per value, whoever wrote it.
    assert_close(losses(tmp_path / "run"), straight)


def command(*words, **options):
    return subprocess.run(
        [sys.executable, *map(str, words)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", **options},
    )


def test_the_command_starts_its_processes(corpora, straight, tmp_path):
    file = write_run(tmp_path, corpora, "run", {"stage": 0, "fsdp_algorithm": None, **PIPELINE})
    done = command("-m", "lme_cli", "train", file, "--nproc", 2)
    assert done.returncode == 0, done.stderr
    assert "[rank 0]   batch        8 sequences of 16 tokens" in done.stdout
    assert "stage 1 on rank 1: layers 1 to 1" in done.stdout + done.stderr
    # The others only warn.
    assert "[rank 1]" not in done.stdout + done.stderr
    assert_close(losses(tmp_path / "run"), straight)


def test_torchrun_starts_the_same_run(corpora, straight, tmp_path):
    file = write_run(tmp_path, corpora, "run", {"stage": 1})
    run = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2)
    done = command(*run, "-m", "lme_cli", "pretrain", "--config", file)
    assert done.returncode == 0, done.stderr
    assert_close(losses(tmp_path / "run"), straight)


def test_the_first_process_that_fails_ends_all_and_is_named(corpora, tmp_path):
    file = write_run(tmp_path, corpora, "run", {"stage": 3})
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.jsonl").mkdir()
    done = command("-m", "lme_cli", "train", file, "--nproc", 2)
    assert done.returncode == 1
    # Rank 1 waits for rank 0, which cannot write its metrics.
    assert done.stderr.splitlines()[-1].startswith("error: rank 0 failed first, with exit code 1:")
    assert "metrics.jsonl" in done.stderr.splitlines()[-1]


def test_a_layout_that_does_not_fit_is_refused_before_anything_starts(
    corpora, tmp_path, monkeypatch, capsys
):
    file = write_run(tmp_path, corpora, "run", {"tensor_parallel_world_size": 4})
    monkeypatch.setattr("subprocess.Popen", lambda *_, **__: pytest.fail("something was started"))
    monkeypatch.setattr("sys.argv", ["lme", "train", str(file), "--nproc", "2"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    shown = capsys.readouterr()
    assert "does not fit 2 processes" in shown.err
    assert "[rank" not in shown.err
