"""After a bad step a run goes back to its checkpoint and goes on behind the bad batch."""

import json

import numpy as np
import pytest

from lme_core.training.objectives import NextToken
from lme_data.writer import IndexedWriter
from lme_parallel.testing import run_distributed

STEPS = 12
BATCH = 8
RUN = """
datasets:
  - class_name: MegatronDataset
    data_name: large
    data_sampling_ratio: 3
    class_args: {{data_path: [{folder}/large], split: "90,10,0", sequence_length: 16, eval_steps: 1}}
  - class_name: MegatronDataset
    data_name: small
    data_sampling_ratio: 1
    class_args: {{data_path: [{folder}/small], split: "90,10,0", sequence_length: 16, eval_steps: 1}}
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
    sequence_mixer_blocks: [{{num_attention_heads: 2, num_key_value_heads: 1, dropout: 0.1}}]
    mlp_blocks: [{{activation_function: swiglu, intermediate_size: 64, dropout: 0.1}}]
tuning_args: {{tuning_method: pretraining}}
training_parameters:
  num_training_steps: {steps}
  micro_batch_size: 2
  global_batch_size: 8
  eval_interval: 6
  bad_step_policy: rewind
  max_rewinds: 2
lr_scheduler_args: {{num_warmup_steps: 2, lr_decay_style: linear}}
# Adam would make whole steps of rounding errors where a gradient is zero.
optimizer_args: {{class_name: TorchSGD, class_args: {{lr: 0.05, momentum: 0.9}}}}
logging_args: {{log_interval: 3}}
distributed_args: {distributed}
save_args: {{save_path: {run}, save_interval: 4, async_checkpointing: {is_async}}}
"""


class Stopper:
    """Asks all processes to stop, from the one that tracks."""

    def __init__(self, file, step):
        self.file, self.step = file, step

    def log(self, record):
        if record["step"] == self.step:
            self.file.touch()

    start = load_state_dict = lambda self, value: None
    flush = finish = lambda self: None

    def state_dict(self):
        return {}


def poison(plan, bad, rank):
    """Make the loss of one rank not a number whenever it reads the batch of one of these steps."""
    from dataclasses import replace

    from lme_cli.run_data import open_data

    loader = open_data(plan, None).train
    poisoned = []
    for step in bad:
        loader.skip_to((step - 1) * BATCH)
        poisoned.append(next(loader)["input_ids"])
    loader.close()
    whole = NextToken.loss

    def loss(self, outputs, batch):
        sums = whole(self, outputs, batch)
        is_bad = any(batch["input_ids"].equal(each) for each in poisoned)
        if plan.launch.rank != rank or not is_bad:
            return sums
        return replace(sums, total=sums.total * float("nan"))

    NextToken.loss = loss


def train(file, bad=(), rank=0, stop_at=None, skip_to=None):
    """Train in the group that is there, as the command would in the same processes."""

    from lme_cli.compose import compose
    from lme_cli.loading import load_run
    from lme_cli.planning import make_plan
    from lme_core.training.anomalies import BadStepError

    loaded = load_run(file)
    plan = make_plan(loaded.run)
    (plan.save_path / "KILLSWITCH").unlink(missing_ok=True)
    poison(plan, bad, rank)
    stopper = Stopper(plan.save_path / "KILLSWITCH", stop_at)
    run = compose(plan, loaded.run_file, trackers={"stopper": stopper})
    if skip_to is not None:
        run.loaders.train.skip_to(skip_to)
    try:
        run.trainer.fit(run.state)
    except BadStepError as error:
        return str(error)
    finally:
        run.trackers.finish()
    return run.state.step


def train_in_parts(file, bad, rank, stops):
    """Train, and again after each stop; return where each part ended."""
    return [train(file, bad, rank, stop_at=each) for each in stops]


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


def write_run(folder, corpora, name, distributed, *, is_async=False):
    file = folder / f"{name}.yml"
    text = RUN.format(
        folder=corpora,
        run=folder / name,
        steps=STEPS,
        distributed=json.dumps(distributed),
        is_async=str(is_async).lower(),
    )
    file.write_text(text)
    return str(file)


def values(run):
    """Loss and gradient norm by context, group and step; one line each."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    names = [(row["context"], row["group"], row["step"]) for row in rows]
    assert len(set(names)) == len(names)
    return {
        (*key, name): row[name]
        for key, row in zip(names, rows, strict=True)
        for name in ("loss", "grad_norm", "tokens", "learning_rate")
        if name in row
    }


def rewinds(run, rank=0):
    """Steps recorded as bad, and from where the run went back to where."""
    path = run / f"bad-steps-rank{rank}.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return (
        [row["step"] for row in rows if "step" in row],
        [(row["rewound_from"], row["rewound_to"]) for row in rows if "rewound_to" in row],
        [row["data_position"]["position"] for row in rows if "rewound_to" in row],
    )


@pytest.fixture(scope="module")
def straight(tmp_path_factory, corpora):
    """In one process: to step 4, then from there on with the data behind that of step 7."""
    folder = tmp_path_factory.mktemp("straight")
    file = write_run(folder, corpora, "run", {})
    # The record of step 3 makes it stop after the next one.
    train(file, stop_at=3)
    train(file, skip_to=7 * BATCH)
    return values(folder / "run")


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        # fp32 over twelve steps, summed in another order.
        assert found[key] == pytest.approx(value, rel=5e-6), key


def test_two_processes_go_back_together_and_a_resumed_run_goes_on_alike(
    corpora, straight, tmp_path
):
    file = write_run(tmp_path, corpora, "run", {"stage": 3}, is_async=True)
    # Only rank 1 reads it; found at step 8, before what would be the second save.
    assert run_distributed(train_in_parts, 2, file, (7,), 1, (9, None)) == [[10, STEPS]] * 2
    run = tmp_path / "run"
    # The bad batch was not met again, by neither part.
    for rank in range(2):
        assert rewinds(run, rank) == ([7], [(8, 4)], [7 * BATCH])
    assert_close(values(run), straight)
    state = json.loads((run / "global_step12/state.json").read_text())
    assert state["stateful"]["guard"]["rewinds"] == 1
    # 4 steps, then 8 behind the data of 7: three more than the order was made for.
    assert state["stateful"]["loader"]["position"] == 15 * BATCH
    assert state["tokens"] == STEPS * BATCH * 16


def test_a_run_that_ends_right_after_it_went_back_goes_back_again(
    corpora, straight, tmp_path, monkeypatch
):
    monkeypatch.setattr(NextToken, "loss", NextToken.loss)
    file = write_run(tmp_path, corpora, "run", {})
    # Asked to stop at the step at which the bad one is found.
    assert train_in_parts(file, (7,), 0, (6, None)) == [4, STEPS]
    assert rewinds(tmp_path / "run") == ([7, 7], [(7, 4), (8, 4)], [7 * BATCH] * 2)
    assert_close(values(tmp_path / "run"), straight)


def test_a_start_is_gone_back_to_and_too_many_rewinds_end_every_process(corpora, tmp_path):
    file = write_run(tmp_path, corpora, "run", {"stage": 1})
    messages = run_distributed(train, 2, file, (2, 3, 5, 6, 7), 0)
    run = tmp_path / "run"
    # Looked for at steps 1, 3 and 4: both of the first two are found at 3, and then each rewound
    # run meets the next ones.
    assert rewinds(run, 1) == ([2, 3, 2, 3, 1], [(3, 0), (3, 0)], [3 * BATCH, 6 * BATCH])
    for message in messages:
        assert "after the run went back `training_parameters.max_rewinds` 2 times" in message
    assert not (run / "global_step4").exists()
