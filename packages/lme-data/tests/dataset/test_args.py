"""Entries of `datasets`: what is accepted and what is refused by name."""

import dataclasses

import pytest

from lme_data.dataset import (
    DebugClassArgs,
    DebugDatasetArgs,
    HuggingFaceClassArgs,
    HuggingFaceDatasetArgs,
    MegatronClassArgs,
    MegatronDatasetArgs,
    PresetDatasetArgs,
)

MEGATRON = {"sequence_length": 8, "data_path": "p", "split": "98,1,1"}


def megatron(**class_args):
    return MegatronDatasetArgs(
        data_name="m", class_args=MegatronClassArgs(**{**MEGATRON, **class_args})
    )


@pytest.mark.parametrize(
    ("class_args", "setting"),
    [
        ({"sequence_length": 0}, "sequence_length"),
        ({"eval_steps": -1}, "eval_steps"),
        ({"num_workers": -1}, "num_workers"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**32}, "seed"),
        ({"fim_rate": 1.5}, "fim_rate"),
        ({"fim_spm_rate": -0.1}, "fim_spm_rate"),
        ({"data_path": None}, "data_path"),
        ({"split": None}, "split"),
        ({"train_data_path": "q"}, "train_data_path"),
        ({"data_path": []}, "data_path"),
        ({"data_path": None, "val_data_path": [0, "x", 1, "y"]}, "val_data_path"),
    ],
)
def test_wrong_megatron_settings_are_named(class_args, setting):
    with pytest.raises(ValueError, match=f"`{setting}`"):
        megatron(**class_args)


@pytest.mark.parametrize(
    ("change", "setting"),
    [
        ({"data_name": ""}, "data_name"),
        ({"data_sampling_ratio": 0}, "data_sampling_ratio"),
        ({"data_sampling_ratio": -1.5}, "data_sampling_ratio"),
        ({"data_sampling_ratio": float("nan")}, "data_sampling_ratio"),
        ({"input_format": "x"}, "input_format"),
        ({"output_format": "x"}, "output_format"),
        ({"max_input_tokens": 5}, "max_input_tokens"),
        ({"max_output_tokens": 5}, "max_output_tokens"),
    ],
)
def test_settings_without_meaning_for_tokens_are_named(change, setting):
    with pytest.raises(ValueError, match=f"`{setting}`"):
        dataclasses.replace(megatron(), **change)


@pytest.mark.parametrize("ratio", [None, 1, 0.25, 7.5])
def test_any_positive_ratio_is_taken(ratio):
    assert dataclasses.replace(megatron(), data_sampling_ratio=ratio).data_sampling_ratio == ratio


def test_wrong_settings_of_text_datasets_are_named():
    text = HuggingFaceDatasetArgs(data_name="h", class_args=HuggingFaceClassArgs(data_path="x"))
    for change, setting in (({"max_input_tokens": 0}, "max_input_tokens"),):
        with pytest.raises(ValueError, match=f"`{setting}`"):
            dataclasses.replace(text, **change)
    with pytest.raises(ValueError, match="`data_path`"):
        HuggingFaceClassArgs(data_path="")
    with pytest.raises(ValueError, match="`input_format`"):
        PresetDatasetArgs(class_name="AlpacaDataset", data_name="a", input_format="x __input__")
    PresetDatasetArgs(class_name="SST2Dataset", data_name="s", input_format="x __input__")


@pytest.mark.parametrize(
    ("class_args", "setting"),
    [({"num_examples": 0}, "num_examples"), ({"token_id": -1}, "token_id")],
)
def test_wrong_debug_settings_are_named(class_args, setting):
    with pytest.raises(ValueError, match=f"`{setting}`"):
        DebugClassArgs(**{"num_examples": 1, **class_args})
    with pytest.raises(ValueError, match="`input_format`"):
        DebugDatasetArgs(data_name="d", class_args=DebugClassArgs(num_examples=1), input_format="x")
