"""Finetuning data: formats, limits, order, files."""

import gzip
import json

import numpy as np
import pytest
import torch

from lme_data.build import build_loaders
from lme_data.context import DataContext
from lme_data.dataset import (
    HuggingFaceClassArgs,
    HuggingFaceDatasetArgs,
    PresetClassArgs,
    PresetDatasetArgs,
)
from lme_data.example_files import read_rows
from lme_data.examples import ExampleList

ROWS = [{"q": f"question {n}", "a": f"answer number {n}"} for n in range(20)]


def write_lines(path, rows=ROWS):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def entry(path, name="h", **settings):
    return HuggingFaceDatasetArgs(
        data_name=name,
        class_args=HuggingFaceClassArgs(
            data_path=str(path), input_key="q", output_key="a", num_workers=0
        ),
        **settings,
    )


def build(datasets, tokenizer, **settings):
    chosen = {"micro_batch_size": 2, "global_batch_size": 4, "num_training_steps": 10, **settings}
    return build_loaders(datasets, tuning_method="full_finetuning", tokenizer=tokenizer, **chosen)


def rows_of(batches, tokenizer):
    """Text of input and of target of each row."""
    found = []
    for batch in batches:
        valid = batch.get("valid", torch.ones_like(batch["input_ids"], dtype=torch.bool))
        for ids, labels, mask in zip(batch["input_ids"], batch["labels"], valid, strict=True):
            targets = labels[labels != -100].tolist()
            found.append((tokenizer.decode(ids[mask].tolist()), tokenizer.decode(targets)))
    return found


def test_formats_and_end_of_text(tmp_path, tokenizer):
    path = write_lines(tmp_path / "a.jsonl")
    chosen = entry(path, input_format="Q: __input__ __input__\nA: ", output_format="<__output__>")
    found = rows_of([next(build([chosen], tokenizer).train) for _ in range(10)], tokenizer)
    expected = {
        (
            f"Q: {row['q']} __input__\nA: <{row['a']}><|endoftext|>",
            f"<{row['a']}><|endoftext|>",
        )
        for row in ROWS
    }
    assert set(found) <= expected


@pytest.mark.parametrize(("max_input", "max_output"), [(1, 1), (4, 2), (100, 5)])
def test_limits_are_exact_with_the_end_of_text_inside(tmp_path, tokenizer, max_input, max_output):
    chosen = entry(
        write_lines(tmp_path / "a.jsonl"), max_input_tokens=max_input, max_output_tokens=max_output
    )
    source = chosen.open_examples("train", context(tokenizer))
    assert source is not None
    rows = source.fetch(np.arange(len(ROWS)))
    for tokens, prompt in zip(rows.tokens, rows.prompt_lengths.tolist(), strict=True):
        assert prompt <= max_input
        assert len(tokens) - prompt == max_output
        assert tokens[-1] == tokenizer.eos_token_id


def context(tokenizer):
    return DataContext(seed=1, tokenizer=tokenizer, eos_token_id=tokenizer.eos_token_id)


def test_each_epoch_has_every_example_once_in_another_order(tmp_path, tokenizer):
    loaders = build([entry(write_lines(tmp_path / "a.jsonl"))], tokenizer)
    found = [text for text, _ in rows_of([next(loaders.train) for _ in range(20)], tokenizer)]
    assert sorted(found[:20]) == sorted(found[20:]) == sorted({*found})
    assert found[:20] != found[20:]


def test_resumed_epoch_goes_on_without_repeating(tmp_path, tokenizer):
    path = write_lines(tmp_path / "a.jsonl")
    straight = build([entry(path)], tokenizer).train
    expected = rows_of([next(straight) for _ in range(20)], tokenizer)
    first = build([entry(path)], tokenizer).train
    head = rows_of([next(first) for _ in range(6)], tokenizer)
    second = build([entry(path)], tokenizer).train
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert head + rows_of([next(second) for _ in range(14)], tokenizer) == expected


def test_no_mask_trains_the_prompt_too(tmp_path, tokenizer):
    loaders = build([entry(write_lines(tmp_path / "a.jsonl"))], tokenizer, loss_mask="no_mask")
    batch = next(loaders.train)
    lengths = (
        batch["valid"].sum(1) if "valid" in batch else torch.full((2,), batch["labels"].shape[1])
    )
    assert ((batch["labels"] != -100).sum(1) == lengths - 1).all()


def test_missing_validation_split_leaves_evaluation_out(tmp_path, tokenizer, caplog):
    loaders = build([entry(write_lines(tmp_path / "a.jsonl"))], tokenizer)
    assert loaders.val is None
    assert "no data for evaluation: split=val" in caplog.text


def test_validation_keeps_the_order_and_every_example(tmp_path, tokenizer):
    write_lines(tmp_path / "d" / "train.jsonl")
    write_lines(tmp_path / "d" / "validation-0.jsonl", ROWS[:7])
    loaders = build([entry(tmp_path / "d")], tokenizer)
    assert loaders.val is not None
    found = [text for text, target in rows_of(loaders.val, tokenizer) if target]
    assert found == [f"{row['q']}{row['a']}<|endoftext|>" for row in ROWS[:7]]


def test_two_datasets_without_ratio_are_mixed_by_size(tmp_path, tokenizer):
    entries = [
        entry(write_lines(tmp_path / "a.jsonl"), "a"),
        entry(write_lines(tmp_path / "b.jsonl", ROWS[:5]), "b"),
    ]
    loaders = build(entries, tokenizer)
    sources = torch.cat([next(loaders.train)["source"] for _ in range(20)])
    assert int((sources == 1).sum()) == 8


@pytest.mark.parametrize("kind", ["json", "array", "gz", "parquet", "folder"])
def test_files_of_all_kinds_give_the_same_rows(tmp_path, kind):
    path = write_lines(tmp_path / "d" / "a.jsonl")
    if kind == "json":
        path = path.rename(tmp_path / "a.json")
    elif kind == "array":
        path = tmp_path / "b.json"
        path.write_text(json.dumps(ROWS, indent=1))
    elif kind == "gz":
        compressed = tmp_path / "a.jsonl.gz"
        compressed.write_bytes(gzip.compress(path.read_bytes()))
        path = compressed
    elif kind == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        path = tmp_path / "a.parquet"
        parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    else:
        path = path.parent
    assert read_rows(str(path), "train") == ROWS
    assert read_rows(str(path), "val") is None


def test_saved_hub_dataset_is_read_from_disk(tmp_path):
    datasets = pytest.importorskip("datasets")
    parts = {
        "train": datasets.Dataset.from_list(ROWS),
        "test": datasets.Dataset.from_list(ROWS[:3]),
    }
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    assert read_rows(str(tmp_path / "saved"), "train") == ROWS
    assert read_rows(str(tmp_path / "saved"), "test") == ROWS[:3]
    assert read_rows(str(tmp_path / "saved"), "val") is None


def test_wrong_inputs_are_explained(tmp_path, tokenizer):
    path = write_lines(tmp_path / "a.jsonl", [{"q": "x"}])
    with pytest.raises(ValueError, match=r"`output_key` 'a': row 0 .* its columns are \['q'\]"):
        build([entry(path)], tokenizer)
    with pytest.raises(ValueError, match="needs a tokenizer"):
        build([entry(write_lines(tmp_path / "b.jsonl"))], None)
    with pytest.raises(ValueError, match="example 0 holds token id"):
        build([entry(write_lines(tmp_path / "b.jsonl"))], tokenizer, vocab_size=20)
    (tmp_path / "c.jsonl").write_text('{"q": "x", "a": "y"}\nnot json\n')
    with pytest.raises(ValueError, match=r"c\.jsonl:2"):
        build([entry(tmp_path / "c.jsonl")], tokenizer)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no"):
        build([entry(tmp_path / "empty")], tokenizer)


PRESETS = {
    "AlpacaDataset": (
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        "Add.\n\ninput: 1 2\noutput:",
        "3",
    ),
    "DollyDataset": (
        {"instruction": "Name.", "context": "", "response": "Ann"},
        "Name.\n\noutput:",
        "Ann",
    ),
    "SlimOrcaDataset": (
        {
            "conversations": [
                {"from": "system", "value": "Be kind."},
                {"from": "human", "value": "Hi"},
                {"from": "gpt", "value": "Hello"},
            ]
        },
        "Hi\n\ninput: Be kind.\noutput:",
        "Hello",
    ),
    "SST2Dataset": ({"sentence": "good film", "label": 1}, "good film", "positive"),
}


@pytest.mark.parametrize("class_name", PRESETS)
def test_presets_bring_their_prompt(tmp_path, tokenizer, class_name):
    row, prompt, answer = PRESETS[class_name]
    path = write_lines(tmp_path / "a.jsonl", [row] * 4)
    chosen = PresetDatasetArgs(
        class_name=class_name,
        data_name="p",
        class_args=PresetClassArgs(data_path=str(path), num_workers=0),
    )
    found = rows_of([next(build([chosen], tokenizer).train)], tokenizer)
    assert found[0] == (f"{prompt}{answer}<|endoftext|>", f"{answer}<|endoftext|>")


def test_orders_are_permutations_of_seed_and_epoch():
    sizes = np.ones(50, np.int64)
    lists = [
        ExampleList("e", np.arange(50), sizes, np.zeros(50, np.int64), seed=seed) for seed in (1, 2)
    ]
    first, second = (
        [int(tokens[0]) for tokens in each.fetch(np.arange(100)).tokens] for each in lists
    )
    assert sorted(first[:50]) == sorted(first[50:]) == list(range(50))
    assert first[:50] != first[50:]
    assert first != second
