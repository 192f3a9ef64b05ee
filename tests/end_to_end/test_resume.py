"""A run that was killed and started again is the run that was never killed."""

import json
from pathlib import Path

import numpy as np
import pytest

from lme_data.writer import IndexedWriter
from lme_parallel.testing import kill_this_process, run_killed

STEPS = 24
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
      - {{num_attention_heads: 2, num_key_value_heads: 1, dropout: 0.1, softmax_dropout: 0.1}}
    mlp_blocks:
      - {{activation_function: swiglu, intermediate_size: 64, dropout: 0.1}}
tuning_args: {{tuning_method: pretraining}}
training_parameters:
  num_training_steps: {steps}
  micro_batch_size: 2
  gradient_accumulation_steps: 2
  eval_interval: 8
lr_scheduler_args: {{num_warmup_steps: 4}}
optimizer_args: {{class_args: {{lr: 1e-2}}}}
mixed_precision_args: {{dtype: {dtype}}}
logging_args: {{log_interval: 1}}
save_args:
  save_path: {run}
  save_interval: 3
  async_checkpointing: {is_async}
  keep_last: 3
"""


def train(file, kill_step, kill_point):
    """In a process of its own: train, and die after a step's metrics or before a numbered write."""
    from lme_cli.compose import compose
    from lme_cli.loading import load_run
    from lme_cli.planning import make_plan

    loaded = load_run(file)
    counter = iter(range(10**9))

    def point(name):
        if next(counter) == kill_point:
            kill_this_process()

    run = compose(
        make_plan(loaded.run),
        loaded.run_file,
        trackers={"killer": _Killer(kill_step)},
        point=point,
    )
    try:
        run.trainer.fit(run.state)
    finally:
        run.trackers.finish()


class _Killer:
    def __init__(self, step):
        self._step = step

    def start(self, step):
        pass

    def log(self, record):
        if record["step"] == self._step:
            kill_this_process()

    def flush(self):
        pass

    def finish(self):
        pass

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    """Two corpora; the small one's epoch ends several times within the run."""
    folder = tmp_path_factory.mktemp("corpora")
    random = np.random.default_rng(0)
    for name, documents in (("large", 120), ("small", 12)):
        with IndexedWriter(folder / name, np.dtype("uint16")) as writer:
            for _ in range(documents):
                # The next id follows from the last, so that there is something to learn.
                ids = (random.integers(63) + np.arange(random.integers(5, 60))) % 63 + 1
                writer.add_document(np.append(ids, 0))
            writer.finalize()
    return folder


def write_run(folder, corpora, name, *, is_async=False, dtype="fp32"):
    file = folder / f"{name}.yml"
    file.write_text(
        RUN.format(
            folder=corpora,
            run=folder / name,
            steps=STEPS,
            is_async=str(is_async).lower(),
            dtype=dtype,
        )
    )
    return file


@pytest.fixture(scope="module")
def straight(tmp_path_factory, corpora):
    """The run that nothing happened to, for each dtype."""
    runs = {}
    folder = tmp_path_factory.mktemp("straight")
    for dtype in ("fp32", "bf16"):
        assert not run_killed(train, write_run(folder, corpora, dtype, dtype=dtype), None, None)
        runs[dtype] = folder / dtype
    return runs


def timeless(run):
    """The metrics without what a clock or the machine decides."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    machine = {"tokens_per_second", "tflops_per_device", "mfu", "peak_memory_bytes"}
    return [
        {
            key: value
            for key, value in row.items()
            if not (key.endswith("_seconds") or key in machine)
        }
        for row in rows
    ]


def content(run):
    """Every byte of the last checkpoint: parameters, optimizer, counters, position, architecture."""
    last = run / f"global_step{STEPS}"
    files = {
        str(path.relative_to(last)): path.read_bytes()
        for path in last.rglob("*")
        if path.is_file() and path.name not in ("COMMIT", "run.resolved.json")
    }
    assert len(files) > 40
    return files


def assert_same(run, other):
    assert timeless(run) == timeless(other)
    ours, theirs = content(run), content(other)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name] != theirs[name]] == []


def test_the_straight_run_learns_and_passes_epochs_of_the_small_corpus(straight):
    rows = timeless(straight["fp32"])
    losses = [row["loss"] for row in rows if row["context"] == "train"]
    assert len(losses) == STEPS
    # ln 63 = 4.1 is what a model knows of them that has seen none.
    assert np.mean(losses[-4:]) < np.mean(losses[:4]) - 0.5
    assert {row["group"] for row in rows if row["context"] == "val"} == {None, "large", "small"}
    state = json.loads((straight["fp32"] / f"global_step{STEPS}/state.json").read_text())
    assert state["stateful"]["loader"]["cursors"]["small"] == STEPS * 4 // 4


@pytest.mark.parametrize(
    ("is_async", "dtype", "cuts"),
    [
        # Between saves, inside an epoch.
        (False, "fp32", [7]),
        # At the step of a save and of an evaluation: the metrics are there, the checkpoint is not.
        (True, "fp32", [24]),
        # Again and again, at ends of epochs of the small corpus among them.
        (True, "fp32", [2, 12, 19]),
        (False, "bf16", [10]),
    ],
)
def test_killed_after_a_step_and_started_again(straight, corpora, tmp_path, is_async, dtype, cuts):
    file = write_run(tmp_path, corpora, "run", is_async=is_async, dtype=dtype)
    for cut in cuts:
        assert run_killed(train, file, cut, None)
    assert not run_killed(train, file, None, None)
    assert_same(tmp_path / "run", straight[dtype])


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_killed_while_saving_and_started_again(straight, corpora, tmp_path, is_async):
    """At points spread over the writes of the first saves, removal of old ones included."""
    file = write_run(tmp_path, corpora, "run", is_async=is_async)
    for kill_point in (9, 33):
        assert run_killed(train, file, None, kill_point)
    assert not run_killed(train, file, None, None)
    assert_same(tmp_path / "run", straight["fp32"])


def test_checkpoints_that_never_became_one_are_left_behind_by_nobody(straight):
    names = {path.name for path in Path(straight["fp32"]).iterdir()}
    assert {name for name in names if name.startswith("global_step")} == {
        "global_step18", "global_step21", "global_step24"
    }  # fmt: skip
