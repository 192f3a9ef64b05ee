"""A run that is asked to stop ends in a committed checkpoint and exit code 0."""

import json
import os
import signal
import subprocess
import sys

import pytest

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
    sequence_mixer_blocks: [{{num_attention_heads: 2, num_key_value_heads: 1}}]
    mlp_blocks: [{{activation_function: swiglu, intermediate_size: 32}}]
tuning_args: {{tuning_method: pretraining}}
training_parameters: {{num_training_steps: 1000000, micro_batch_size: 1, eval_during_training: false}}
logging_args: {{log_interval: 1}}
save_args: {{save_path: {run}, save_interval: 1000000}}
"""


@pytest.mark.parametrize("how", ["SIGTERM", "KILLSWITCH"])
def test_a_run_asked_to_stop_saves_and_ends_well(tmp_path, how):
    run = tmp_path / "run"
    (tmp_path / "run.yml").write_text(RUN.format(run=run))
    process = subprocess.Popen(
        [sys.executable, "-m", "lme_cli", "train", str(tmp_path / "run.yml")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    for line in process.stdout:
        if line.startswith("step 3/"):
            break
    if how == "SIGTERM":
        process.send_signal(signal.SIGTERM)
    else:
        (run / "KILLSWITCH").touch()
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "the same command continues" in out
    (checkpoint,) = run.glob("global_step*")
    assert (checkpoint / "COMMIT").exists()
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert checkpoint.name == f"global_step{last['step']}"
    pointer = json.loads((run / "latest_checkpointed_iteration.json").read_text())
    assert pointer == {"latest_checkpointed_iteration": last["step"]}
