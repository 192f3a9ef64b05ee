"""What is left of an epoch is trained on once each, however many ranks go on with it."""

import json
import shutil

import numpy as np
import pytest

from lme_data.writer import IndexedWriter
from lme_parallel.testing import run_distributed

STEPS = 6
BATCH = 8
RUN = """
datasets:
  - class_name: MegatronDataset
    data_name: text
    class_args: {{data_path: [{folder}/text], split: "1,0,0", sequence_length: 16, order: stable}}
model_args:
  pretrained_config:
    model_type: gpt_base
    vocab_size: 1024
    hidden_size: 16
    num_layers: 1
    sequence_mixer_blocks: [{{num_attention_heads: 2, num_key_value_heads: 1}}]
    mlp_blocks: [{{activation_function: swiglu, intermediate_size: 32}}]
tuning_args: {{tuning_method: pretraining}}
training_parameters:
  num_training_steps: {steps}
  micro_batch_size: 2
  global_batch_size: 8
  eval_during_training: false
lr_scheduler_args: {{num_warmup_steps: 0, lr_decay_style: constant}}
optimizer_args: {{class_name: TorchSGD, class_args: {{lr: 0.01}}}}
distributed_args: {{stage: 1}}
save_args: {{save_path: {run}, save_interval: 3}}
"""


def train(file, stop_at=None):
    """Train in the group that is there; return the rows that this process trained on."""

    from lme_cli.compose import compose
    from lme_cli.loading import load_run
    from lme_cli.planning import make_plan

    def stop(state, report):
        if state.step == stop_at:
            state.stop_reason = "enough"

    loaded = load_run(file)
    run = compose(make_plan(loaded.run), loaded.run_file, first_hooks=[stop])
    rows, whole = [], run.runtime.forward_backward

    def forward_backward(objective, batches):
        for batch in batches:
            rows.extend(batch["input_ids"].tolist())
        return whole(objective, batches)

    run.runtime.forward_backward = forward_backward
    try:
        run.trainer.fit(run.state)
    finally:
        run.trackers.finish()
    return rows


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """As many tokens as six steps need, in documents of any length."""
    folder = tmp_path_factory.mktemp("text")
    tokens = np.random.default_rng(0).integers(1, 1024, STEPS * BATCH * 16 + 1)
    with IndexedWriter(folder / "text", np.dtype("uint16")) as writer:
        for part in np.array_split(tokens, [50, 61, 300, 555]):
            writer.add_document(part)
        writer.finalize()
    return folder


def write_run(folder, text, name):
    file = folder / f"{name}.yml"
    file.write_text(RUN.format(folder=text, run=folder / name, steps=STEPS))
    return str(file)


def test_the_rest_of_an_epoch_is_the_same_for_one_two_and_four_ranks(text, tmp_path):
    straight = train(write_run(tmp_path, text, "straight"))
    assert len({tuple(row) for row in straight}) == len(straight) == STEPS * BATCH
    first = run_distributed(train, 2, write_run(tmp_path, text, "one"), 3)
    before = [row for rows in first for row in rows]
    assert sorted(before) == sorted(straight[: 3 * BATCH])
    shutil.copytree(tmp_path / "one", tmp_path / "four")
    rest = sorted(straight[3 * BATCH :])
    assert sorted(train(write_run(tmp_path, text, "one"))) == rest
    ranks = run_distributed(train, 4, write_run(tmp_path, text, "four"))
    assert [len(rows) for rows in ranks] == [3 * BATCH // 4] * 4
    assert sorted(row for rows in ranks for row in rows) == rest
    for name in ("one", "four"):
        state = json.loads((tmp_path / name / f"global_step{STEPS}/state.json").read_text())
        assert state["stateful"]["loader"]["position"] == STEPS * BATCH
