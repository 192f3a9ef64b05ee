import pytest
import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from lme_core.training.args import (
    MixedPrecisionArgs,
    ModelArgs,
    NoEffectWarning,
    RandomArgs,
    TrainingParameters,
    TuningArgs,
)
from lme_core.training.optimizers import OptimizerArgs, TorchAdamWArgs
from lme_core.training.teacher_args import TeacherArgs
from lme_core.training.tracking import AimArgs, LoggingArgs


class Door(BaseModel):
    """As a run file's model takes the sections."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model_args: ModelArgs | None = None
    optimizer_args: OptimizerArgs = TorchAdamWArgs()
    training_parameters: TrainingParameters | None = None


def test_a_new_model_is_read_strictly_from_its_architecture():
    config = {"model_type": "gpt_base", "vocab_size": 64, "hidden_size": 48, "num_layers": 1}
    args = Door.model_validate({"model_args": {"pretrained_config": config}}).model_args
    assert args.pretrained_config.hidden_size == 48
    with pytest.raises(ValidationError, match="hiden_size"):
        Door.model_validate({"model_args": {"pretrained_config": {**config, "hiden_size": 3}}})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "got neither"),
        ({"model_name": "x", "trust_remote_code": True}, "trust_remote_code.*never runs code"),
        ({"model_name": "x", "reset_position_ids": True}, "needs `model_args.reset_attention_mask"),
    ],
)
def test_models_that_cannot_be_are_refused_with_the_reason(arguments, message):
    with pytest.raises(ValueError, match=message):
        ModelArgs(**arguments)


@pytest.mark.parametrize("name", ["use_padding_free_transformer", "efficient_initialization"])
def test_settings_without_effect_are_accepted_and_name_themselves(name):
    with pytest.warns(NoEffectWarning, match=f"`model_args.{name}` has no effect"):
        ModelArgs(model_name="x", **{name: True})


def test_a_warning_points_at_the_caller():
    with pytest.warns(NoEffectWarning) as caught:
        ModelArgs(model_name="x", efficient_initialization=True)
    assert caught[0].filename == __file__


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_training_steps": 0, "micro_batch_size": 1}, "num_training_steps.*at least 1, got 0"),
        ({"num_training_steps": 1, "micro_batch_size": 1, "max_rewinds": 0}, "max_rewinds.*got 0"),
        ({"num_training_steps": 1}, "give `micro_batch_size`"),
        ({"num_training_steps": 1, "global_batch_size": 8}, "does not determine the batch"),
        (
            {"num_training_steps": 1, "micro_batch_size": 1, "gradient_clipping": 0},
            "gradient_clipping.*above 0",
        ),
    ],
)
def test_impossible_training_parameters_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        TrainingParameters(**arguments)


def test_both_vintages_of_training_parameters_are_accepted():
    old = TrainingParameters(num_training_steps=3, micro_batch_size=4)
    new = TrainingParameters(
        num_training_steps=3, gradient_accumulation_steps=2, global_batch_size=16
    )
    assert (old.gradient_clipping, old.eval_during_training, old.eval_interval) == (1.0, True, None)
    assert (new.micro_batch_size, new.loss_mask) == (None, "output_only")


@pytest.mark.parametrize(
    ("spelling", "dtype"),
    [
        ("fp32", torch.float32),
        ("float32", torch.float32),
        ("bf16", torch.bfloat16),
        ("bfloat16", torch.bfloat16),
        ("fp16", torch.float16),
        ("float16", torch.float16),
    ],
)
def test_dtypes_have_two_spellings(spelling, dtype):
    assert MixedPrecisionArgs(dtype=spelling).torch_dtype is dtype
    teacher = TeacherArgs(model_name="t", dtype=spelling, kl_divergence_method="forward")
    assert teacher.torch_dtype is dtype


def test_fp8_is_refused_with_the_reason():
    with pytest.raises(ValueError, match="fp8: 8-bit training needs scaled matrix products"):
        MixedPrecisionArgs(dtype="fp8")


def test_optimizer_arguments_are_merged_with_the_defaults():
    args = Door.model_validate({"optimizer_args": {"class_args": {"lr": "3e-4"}}}).optimizer_args
    assert isinstance(args, TorchAdamWArgs)
    chosen = args.class_args
    assert (chosen.lr, chosen.weight_decay, chosen.betas) == (3e-4, 0.1, (0.9, 0.95))
    assert (chosen.eps, TorchAdamWArgs().class_args.lr) == (1e-8, 1e-5)


def test_an_optimizer_reads_back_from_what_it_writes():
    door = Door.model_validate({"optimizer_args": {"class_name": "TorchSGD"}})
    assert Door.model_validate_json(door.model_dump_json()) == door


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"class_name": "TorchAdamW", "class_args": {"learning_rate": 1}}, "learning_rate"),
        ({"class_name": "TorchSGD", "class_args": {"betas": [0, 0]}}, "betas"),
        ({"class_name": "AdamW"}, "does not match any of the expected tags"),
        ({"class_name": "TorchLBFGS"}, "line search"),
        ({"class_args": {"lr": -1}}, "`optimizer_args.class_args.lr` must be at least 0"),
        ({"class_args": {"betas": [0.9, 1]}}, "betas` must be at least 0 and below 1"),
        ({"use_optimizer_with_backward_hook": True}, "inside the backward pass"),
        ({"class_name": "TorchSGD", "class_args": {"nesterov": True}}, "needs a `momentum`"),
    ],
)
def test_wrong_optimizer_sections_are_refused(section, message):
    with pytest.raises(ValidationError, match=message):
        Door.model_validate({"optimizer_args": section})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"log_interval": 0}, "log_interval.*at least 1"),
        ({"logging_level": "LOUD"}, "got LOUD"),
        ({"experiments_tracker_name": "wandb"}, "`logging_args.wandb_args` must be given"),
        (
            {"experiments_tracker_name": "wandb", "aim_args": AimArgs(repo="r", experiment="e")},
            "`logging_args.wandb_args` must be given",
        ),
    ],
)
def test_wrong_logging_sections_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        LoggingArgs(**arguments)


def test_seeds_fit_64_bits():
    assert RandomArgs().seed == 42
    with pytest.raises(ValueError, match="64 bits"):
        RandomArgs(seed=2**63)


def test_methods_are_named():
    assert TuningArgs(tuning_method="pretraining").tuning_method == "pretraining"
