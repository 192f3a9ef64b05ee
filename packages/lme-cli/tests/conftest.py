"""What the tests of the command line share: run files as text, and the command in this process."""

from pathlib import Path

import pytest

DATA = Path(__file__).parent / "data"


@pytest.fixture(scope="session")
def data_folder():
    """Run files used by several test files."""
    return DATA


@pytest.fixture
def lme(capsys, monkeypatch):
    """Run `lme` in this process; gives exit code, standard output and standard error."""
    from lme_cli import app

    def run(*arguments, width=100):
        monkeypatch.setenv("COLUMNS", str(width))
        monkeypatch.setattr("sys.argv", ["lme", *map(str, arguments)])
        code = 0
        try:
            app.main()
        except SystemExit as error:
            code = error.code or 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def tiny_run(tmp_path):
    """Write a run file that trains in a second and give its path."""
    file = tmp_path / "run.yml"
    file.write_text(TINY.format(save_path=tmp_path / "run"))
    return file


TINY = """
datasets:
  - class_name: DebugDataset
    data_name: debug
    class_args: {{num_examples: 64, sequence_length: 16, static_examples: false, eval_steps: 2}}
model_args:
  pretrained_config:
    model_type: gpt_base
    vocab_size: 64
    hidden_size: 32
    num_layers: 2
    max_position_embeddings: 64
    sequence_mixer_blocks:
      - {{sequence_mixer_type: softmax_attention, num_attention_heads: 2, num_key_value_heads: 1}}
    mlp_blocks:
      - {{mlp_type: MLP, activation_function: swiglu, intermediate_size: 64}}
tuning_args: {{tuning_method: pretraining}}
training_parameters: {{num_training_steps: 6, micro_batch_size: 2, eval_interval: 3}}
lr_scheduler_args: {{num_warmup_steps: 2}}
optimizer_args: {{class_args: {{lr: 1e-2}}}}
logging_args: {{log_interval: 1}}
distributed_args: {{stage: 0}}
save_args: {{save_path: {save_path}, save_interval: 3}}
"""
