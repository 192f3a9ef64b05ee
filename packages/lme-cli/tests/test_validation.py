"""What errors of a run file say."""

import pytest

from lme_cli.loading import check_run
from lme_cli.problems import RunFileError
from lme_cli.run_file import parse
from lme_cli.validation import suggest

BASE = """
model_args: {pretrained_config: {model_type: gpt_base}}
tuning_args: {tuning_method: pretraining}
datasets: [{class_name: DebugDataset, data_name: d, class_args: {num_examples: 8, sequence_length: 8}}]
save_args: {save_path: x, save_interval: 10}
training_parameters: {num_training_steps: 500, micro_batch_size: 1}
"""


def errors_of(text):
    with pytest.raises(RunFileError) as caught:
        check_run(parse(BASE.lstrip() + text, name="run.yml"))
    return [str(each) for each in caught.value.problems]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "logging_args: {log_intervall: 5}\n",
            "run.yml:6:16: `logging_args.log_intervall` is not a setting; "
            "did you mean `log_interval`?",
        ),
        # The place of another section wins over a similar name in this one.
        (
            "logging_args: {num_warmup_steps: 5}\n",
            "run.yml:6:16: `logging_args.num_warmup_steps` is not a setting; "
            "it belongs at `lr_scheduler_args.num_warmup_steps`",
        ),
        # Names from elsewhere in the field.
        (
            "optimizer_args: {class_args: {learning_rate: 1}}\n",
            "run.yml:6:31: `optimizer_args.class_args.learning_rate` is not a setting; "
            "the setting is called `lr`",
        ),
        (
            "logging_args: {max_grad_norm: 5}\n",
            "run.yml:6:16: `logging_args.max_grad_norm` is not a setting; "
            "it belongs at `training_parameters.gradient_clipping`",
        ),
        (
            "kernel_arg: {}\n",
            "run.yml:6:1: `kernel_arg` is not a section; did you mean `kernel_args`?",
        ),
        (
            "random_args: {seed: many}\n",
            'run.yml:6:15: `random_args.seed` is "many", must be a whole number',
        ),
        (
            "logging_args: {use_colored_logs: perhaps}\n",
            'run.yml:6:16: `logging_args.use_colored_logs` is "perhaps", must be true or false',
        ),
        (
            "mixed_precision_args: {dtype: bf61}\n",
            "run.yml:6:24: `mixed_precision_args.dtype` is \"bf61\", must be 'fp32', 'float32', "
            "'fp16', 'float16', 'bf16', 'bfloat16', 'fp8' or 'float8'; did you mean `bf16`?",
        ),
        ("optimizer_args: 5\n", "run.yml:6:1: `optimizer_args` is `5`, must be a mapping"),
        ("random_args: [1]\n", "run.yml:6:1: `random_args` is a list of 1, must be a mapping"),
        (
            "optimizer_args: {class_name: TorchAdam3}\n",
            "run.yml:6:18: `optimizer_args.class_name` is `TorchAdam3`, must be one of",
        ),
    ],
)
def test_an_error_names_place_setting_value_and_remedy(text, message):
    (found,) = errors_of(text)
    assert found.startswith(message)


def test_all_problems_are_told_at_once_in_the_order_of_the_file():
    found = errors_of("random_args: {sed: 1}\nlogging_args: {log_interval: x, loglevel: 3}\n")
    assert [each.split(":")[1] for each in found] == ["6", "7", "7"]


def test_a_section_speaks_about_itself_at_the_setting_it_names():
    (found,) = errors_of("load_args:\n  load_path: x\n  load_optimizer: false\n")
    assert found.startswith("run.yml:8:3: `load_args` is wrong: `load_optimizer: false` also needs")


@pytest.mark.parametrize(
    ("name", "expected"),
    [("Save-Path", "save_path"), ("savepath", "save_path"), ("zzz", None)],
)
def test_suggestions_overlook_case_and_hyphens(name, expected):
    assert suggest(name, ["save_path", "save_interval"]) == expected
