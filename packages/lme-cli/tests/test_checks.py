"""Rules between sections: each contradiction is one error, before any device is touched."""

import pytest

from lme_cli.loading import check_run
from lme_cli.overrides import apply_overrides
from lme_cli.problems import RunFileError
from lme_cli.run_file import parse

BASE = """
model_args:
  pretrained_config:
    model_type: gpt_base
    vocab_size: 100
    hidden_size: 48
    num_layers: 4
    max_position_embeddings: 64
    sequence_mixer_blocks:
      - {sequence_mixer_type: softmax_attention, num_attention_heads: 6, num_key_value_heads: 2}
    mlp_blocks:
      - {mlp_type: MLP, activation_function: swiglu, intermediate_size: 96}
tuning_args: {tuning_method: pretraining}
datasets:
  - class_name: DebugDataset
    data_name: one
    class_args: {num_examples: 8, sequence_length: 64}
save_args: {save_path: x, save_interval: 10}
training_parameters: {num_training_steps: 500, micro_batch_size: 2}
"""
TEXT = "{class_name: HuggingFaceDataset, data_name: two, class_args: {data_path: x}}"
DEBUG = (
    "{class_name: DebugDataset, data_name: %s, class_args: {num_examples: 8, sequence_length: %s}}"
)


def checked(*settings, world_size=None):
    read = apply_overrides(parse(BASE, name="run.yml"), settings)
    return check_run(read, world_size=world_size)


@pytest.mark.parametrize(
    ("settings", "path", "words"),
    [
        (["tuning_args.tuning_method=distillation"], "teacher_args", ["required", "model_name"]),
        (
            ["teacher_args={model_name: x, kl_divergence_method: forward}"],
            "teacher_args",
            ["`tuning_args.tuning_method` is `pretraining`"],
        ),
        (["datasets=[]"], "datasets", ["empty"]),
        ([f"datasets.1={DEBUG % ('one', 64)}"], "datasets.1.data_name", ["`one`", "differ"]),
        (
            [f"datasets.1={DEBUG % ('two', 32)}"],
            "datasets.1.class_args.sequence_length",
            ["32", "64"],
        ),
        (
            [f"datasets.1={DEBUG % ('two', 64)}", "datasets.0.data_sampling_ratio=2"],
            "datasets.1.data_sampling_ratio",
            ["missing", "or none"],
        ),
        ([f"datasets.0={TEXT}"], "datasets.0.class_name", ["`HuggingFaceDataset`", "tokenize"]),
        (
            ["datasets.0.class_args.sequence_length=null"],
            "datasets.0.class_args.sequence_length",
            ["required for pretraining"],
        ),
        (
            [
                "datasets.0.class_args.sequence_length=65",
                "model_args.pretrained_config.position_embedding_type=learned_absolute",
            ],
            "datasets.0.class_args.sequence_length",
            ["65", "max_position_embeddings", "64"],
        ),
        (["datasets.0.class_args.token_id=100"], "datasets.0.class_args.token_id", ["vocab_size"]),
        (
            [f"datasets.0={TEXT}", "tuning_args.tuning_method=full_finetuning"],
            "tokenizer_args.tokenizer_name",
            ["required"],
        ),
        (
            ["distributed_args.tensor_parallel_world_size=4"],
            "distributed_args.tensor_parallel_world_size",
            ["4", "num_attention_heads", "6"],
        ),
        (
            [
                "distributed_args.num_pipeline_stages=5",
                "distributed_args.pipeline_parallel_schedule=1F1B",
            ],
            "distributed_args.num_pipeline_stages",
            ["5", "num_layers", "4"],
        ),
        (
            [
                "distributed_args.pipeline_parallel_world_size=2",
                "distributed_args.num_pipeline_stages=2",
                "distributed_args.pipeline_parallel_schedule=ZBVZeroBubble",
            ],
            "distributed_args.pipeline_parallel_schedule",
            ["`num_pipeline_stages` must be 4, got 2"],
        ),
        (
            [
                "distributed_args.pipeline_parallel_world_size=2",
                "distributed_args.num_pipeline_stages=2",
                "distributed_args.pipeline_parallel_schedule=1F1B",
                "tuning_args.tuning_method=distillation",
                "teacher_args={model_name: x, kl_divergence_method: forward}",
            ],
            "distributed_args.pipeline_parallel_world_size",
            ["2", "distillation"],
        ),
        (
            [
                "distributed_args.tensor_parallel_world_size=2",
                "distributed_args.sequence_parallel=true",
                "datasets.0.class_args.sequence_length=63",
            ],
            "datasets.0.class_args.sequence_length",
            ["63", "multiple of 2"],
        ),
        (
            [
                "distributed_args.context_parallel_world_size=3",
                "tuning_args.tuning_method=distillation",
                "teacher_args={model_name: x, kl_divergence_method: forward}",
            ],
            "distributed_args.context_parallel_world_size",
            ["is 3", "teacher", "use 1"],
        ),
        (
            ["training_parameters.global_batch_size=7"],
            "training_parameters.global_batch_size",
            ["7", "2"],
        ),
        (
            [
                "training_parameters.bad_step_policy=rewind",
                "save_args.save_optimizer=false",
            ],
            "save_args.save_optimizer",
            ["is false", "rewind"],
        ),
    ],
)
def test_a_contradiction_is_one_error_at_the_setting_to_change(settings, path, words):
    with pytest.raises(RunFileError) as caught:
        checked(*settings)
    assert [".".join(map(str, each.path)) for each in caught.value.problems] == [path]
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "world_size", "words"),
    [
        (["distributed_args.tensor_parallel_world_size=2"], 3, ["multiple of 2 processes", "3"]),
        (
            [
                "distributed_args.pipeline_parallel_world_size=2",
                "distributed_args.num_pipeline_stages=4",
                "distributed_args.pipeline_parallel_schedule=DualPipeV",
                "training_parameters.gradient_accumulation_steps=3",
            ],
            2,
            ["4 micro batches", "got 3", "`gradient_accumulation_steps` to 4"],
        ),
        (["training_parameters.global_batch_size=6"], 2, ["6", "multiple"]),
    ],
)
def test_the_number_of_processes_is_checked_where_it_is_known(settings, world_size, words):
    checked(*settings)
    with pytest.raises(RunFileError) as caught:
        checked(*settings, world_size=world_size)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        (["datasets.0.class_args.sequence_length=65"], "max_position_embeddings"),
        (["lr_scheduler_args.num_warmup_steps=501"], "num_warmup_steps"),
        (["save_args.save_interval=501"], "save_interval"),
        (["model_args.efficient_initialization=true"], "efficient_initialization"),
        (["model_args.pretrained_config.use_cache=true"], "use_cache"),
    ],
)
def test_what_may_surprise_is_a_warning(settings, word):
    (found,) = checked(*settings).warnings
    assert word in str(found)


def test_a_good_file_has_no_warnings():
    assert list(checked().warnings) == []
