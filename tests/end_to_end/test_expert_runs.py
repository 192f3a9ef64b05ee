"""Runs of mixtures of experts: over processes, and killed and started again."""

import json

import numpy as np
import pytest
import torch

from lme_data.writer import IndexedWriter
from lme_parallel.checkpoint.unshard import iterate_tensors
from lme_parallel.testing import kill_this_process, run_distributed, run_killed

STEPS = 6
RUN = """
datasets:
  - class_name: MegatronDataset
    data_name: corpus
    data_sampling_ratio: 1
    class_args: {{data_path: [{folder}/corpus], split: "90,10,0", sequence_length: 16, eval_steps: 2}}
model_args:
  pretrained_config:
    model_type: gpt_base
    vocab_size: 64
    hidden_size: 16
    num_layers: 2
    max_position_embeddings: 16
    position_embedding_type: rope
    eos_token_id: 0
    router_aux_loss_coef: 0.01
    router_z_loss_coef: 0.001
    sequence_mixer_blocks:
      - {{num_attention_heads: 2, num_key_value_heads: 1}}
    mlp_blocks:
      - mlp_type: MoE
        activation_function: swiglu
        intermediate_size: 8
        num_experts: 4
        num_experts_per_tok: 2
        router_score_function: sigmoid
        expert_bias_update_rate: 0.01
        shared_intermediate_size: 8
tuning_args: {{tuning_method: pretraining}}
training_parameters:
  num_training_steps: {steps}
  micro_batch_size: 2
  global_batch_size: 8
  eval_interval: 3
lr_scheduler_args: {{num_warmup_steps: 2, lr_decay_style: constant}}
# Adam would make whole steps of rounding errors where a gradient is zero.
optimizer_args: {{class_name: {optimizer}, class_args: {{lr: 0.05}}}}
logging_args: {{log_interval: 1}}
distributed_args: {distributed}
save_args: {{save_path: {run}, save_interval: 2}}
"""


class Killer:
    """Kills its process after the line of a step is written."""

    def __init__(self, step):
        self.step = step

    def log(self, record):
        if record["step"] == self.step:
            kill_this_process()

    def start(self, step):
        pass

    flush = finish = lambda self: None

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


def train(file, kill_step):
    """In a process of its own: train as the command does, and perhaps die after a step."""

    from lme_cli.compose import compose
    from lme_cli.loading import load_run
    from lme_cli.planning import make_plan

    loaded = load_run(file)
    run = compose(make_plan(loaded.run), loaded.run_file, trackers={"killer": Killer(kill_step)})
    try:
        run.trainer.fit(run.state)
    finally:
        run.trackers.finish()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    random = np.random.default_rng(0)
    with IndexedWriter(folder / "corpus", np.dtype("uint16")) as writer:
        for _ in range(120):
            ids = (random.integers(63) + np.arange(random.integers(5, 60))) % 63 + 1
            writer.add_document(np.append(ids, 0))
        writer.finalize()
    return folder


def write_run(folder, corpus, name, distributed=(), *, optimizer="TorchAdamW"):
    file = folder / f"{name}.yml"
    text = RUN.format(
        folder=corpus,
        run=folder / name,
        steps=STEPS,
        distributed=json.dumps(dict(distributed)),
        optimizer=optimizer,
    )
    file.write_text(text)
    return file


def columns(run):
    """The metrics that training decides, not the clock, by line and name."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    names = {"loss", "lm_loss", "grad_norm", "tokens"}
    found = {
        (row["context"], row["group"], row["step"], name): value
        for row in rows
        for name, value in row.items()
        if name in names or name.startswith(("router_", "expert_"))
    }
    assert len(found) > 10 * STEPS
    return found


def weights(run):
    return dict(iterate_tensors(run / f"global_step{STEPS}", torch.float32))


def test_a_killed_run_goes_on_to_the_same_bits(corpus, tmp_path):
    straight, cut = (write_run(tmp_path, corpus, name) for name in ("straight", "cut"))
    assert not run_killed(train, straight, None)
    # After the checkpoint of step 4.
    assert run_killed(train, cut, 5)
    assert not run_killed(train, cut, None)
    assert columns(tmp_path / "cut") == columns(tmp_path / "straight")
    found, expected = weights(tmp_path / "cut"), weights(tmp_path / "straight")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    biases = [each for name, each in expected.items() if name.endswith("selection_bias")]
    assert len(biases) == 2
    assert all(each.abs().max() > 0.005 for each in biases)


def test_a_run_trains_over_processes_as_in_one(corpus, tmp_path):
    settings = {"expert_parallel_world_size": 2, "stage": 3}
    one = write_run(tmp_path, corpus, "one", optimizer="TorchSGD")
    two = write_run(tmp_path, corpus, "two", settings, optimizer="TorchSGD")
    assert not run_killed(train, one, None)
    run_distributed(train, 2, two, None)
    # fp32 over six steps, summed in another order.
    assert columns(tmp_path / "two") == pytest.approx(columns(tmp_path / "one"), rel=1e-5)
    ours, theirs = weights(tmp_path / "two"), weights(tmp_path / "one")
    assert ours.keys() == theirs.keys()
    for name, each in theirs.items():
        torch.testing.assert_close(ours[name], each, rtol=1e-4, atol=1e-6)
