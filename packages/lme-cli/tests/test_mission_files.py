"""The run files that users of the earlier system have pass as they are."""

from pathlib import Path

import pytest

from lme_cli.loading import check_fragment, load_run
from lme_cli.run_file import load

FILES = sorted((Path(__file__).parent / "data" / "mission").glob("*.yml"))
WHOLE = [file for file in FILES if ".fragment" not in file.name]
FRAGMENTS = [file for file in FILES if ".fragment" in file.name]


@pytest.mark.parametrize("file", WHOLE, ids=lambda file: file.stem)
def test_whole_examples_pass_without_a_warning(file):
    assert list(load_run(file).warnings) == []


@pytest.mark.parametrize("file", FRAGMENTS, ids=lambda file: file.stem)
def test_fragments_pass_as_fragments_and_the_missing_sections_are_listed(file):
    loaded = check_fragment(load(file))
    assert list(loaded.warnings) == []
    assert "save_args" in loaded.missing


def test_the_pretraining_example_means_what_its_page_says():
    run = load_run(next(file for file in WHOLE if file.stem == "pretrain")).run
    config = run.model_args.pretrained_config
    assert config is not None
    assert (config.hidden_size, len(config.mixers()), len(config.mlps())) == (768, 12, 12)
    assert run.optimizer_args.class_args.lr == 3e-4
    assert tuple(run.optimizer_args.class_args.betas) == (0.9, 0.95)
    assert run.training_parameters.gradient_accumulation_steps == 4
    assert run.training_parameters.gradient_clipping == 1.0
    assert run.lr_scheduler_args.num_warmup_steps == 200
    assert run.distributed_args.stage == 3
    assert run.mixed_precision_args.dtype == "bf16"
    assert run.save_args.save_interval == 1000


def test_the_finetuning_example_means_what_its_page_says():
    run = load_run(next(file for file in WHOLE if file.stem == "finetune")).run
    (dataset,) = run.datasets
    assert dataset.class_args.input_key == "instruction"
    assert dataset.input_format == "### Instruction:\n__input__\n\n### Response:\n"
    assert dataset.max_output_tokens == 2048
    assert run.model_args.model_name == "meta-llama/Llama-3.1-8B"
    assert run.training_parameters.eval_interval == 500
