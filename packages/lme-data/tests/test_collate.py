"""Batches: labels, padding, packing, against loops over tokens."""

import numpy as np
import pytest
import torch

from lme_data.collate import ExampleCollator, TokenCollator
from lme_data.examples import ExampleList
from lme_data.rows import TokenRows


class Fixed:
    names = ("f",)

    def __init__(self, tokens):
        self._tokens = np.array(tokens)
        self.sequence_length = self._tokens.shape[1] - 1

    def fetch(self, places):
        return TokenRows(self._tokens[places], np.zeros(len(places), np.int64))


def collate(collator, count, rows=None):
    rows = np.arange(count) if rows is None else np.array(rows)
    return collator(np.arange(count), rows, np.ones(len(rows), bool))


def test_labels_are_the_next_tokens():
    batch = collate(TokenCollator(Fixed([[1, 2, 3, 4], [5, 6, 7, 8]])), 2)
    assert batch["input_ids"].tolist() == [[1, 2, 3], [5, 6, 7]]
    assert batch["labels"].tolist() == [[2, 3, 4], [6, 7, 8]]
    assert batch["token_index"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert set(batch) == {"input_ids", "labels", "token_index", "source"}
    assert all(value.dtype == torch.int64 for value in batch.values())


@pytest.mark.parametrize("restart", [True, False])
def test_packed_rows_carry_documents(restart):
    tokens = [[1, 0, 3, 4, 5], [6, 7, 8, 0, 9]]
    collator = TokenCollator(
        Fixed(tokens), eos_token_id=0, reset_attention_mask=True, reset_position_ids=restart
    )
    batch = collate(collator, 2)
    assert batch["cu_seqlens"].tolist() == [0, 2, 4, 8]
    assert batch["cu_seqlens"].dtype == torch.int32
    expected = [[0, 1, 0, 1], [0, 1, 2, 3]] if restart else [[0, 1, 2, 3]] * 2
    assert batch["position_ids"].tolist() == expected
    assert batch["labels"].tolist() == [[0, -100, 4, 5], [7, 8, 0, -100]]


def test_settings_that_contradict_are_refused():
    with pytest.raises(ValueError, match="`reset_position_ids` needs"):
        TokenCollator(Fixed([[1, 2]]), reset_position_ids=True)
    with pytest.raises(ValueError, match=r"`tokenizer_args\.tokenizer_name`"):
        TokenCollator(Fixed([[1, 2]]), reset_attention_mask=True)


def examples(lengths, prompts):
    tokens = np.arange(1, sum(lengths) + 1, dtype=np.int32)
    return ExampleList("e", tokens, np.array(lengths), np.array(prompts), seed=None)


@pytest.mark.parametrize("loss_mask", ["output_only", "no_mask"])
def test_examples_are_padded_right_and_labelled(loss_mask):
    lengths, prompts = [5, 3, 4], [2, 0, 3]
    collator = ExampleCollator(
        examples(lengths, prompts), pad_token_id=0, loss_mask=loss_mask, multiple_of=4
    )
    batch = collate(collator, 3)
    token = 1
    for row, (length, prompt) in enumerate(zip(lengths, prompts, strict=True)):
        ids = list(range(token, token + length))
        token += length
        first = prompt if loss_mask == "output_only" else 0
        labels = [
            ids[column + 1] if column + 1 < length and column + 1 >= first else -100
            for column in range(8)
        ]
        assert batch["input_ids"][row].tolist() == ids + [0] * (8 - length)
        assert batch["labels"][row].tolist() == labels
        assert batch["valid"][row].tolist() == [True] * length + [False] * (8 - length)


def test_every_micro_batch_has_the_length_of_its_global_batch():
    collator = ExampleCollator(examples([3, 9, 2], [1, 1, 1]), pad_token_id=0, multiple_of=1)
    batch = collate(collator, 3, rows=[2])
    assert batch["input_ids"].shape == (1, 9)
    assert batch["token_index"].tolist() == [list(range(18, 27))]


def test_valid_is_absent_when_all_are():
    collator = ExampleCollator(examples([4, 4], [1, 1]), pad_token_id=0, multiple_of=4)
    assert "valid" not in collate(collator, 2)


def test_padding_with_the_end_of_text_is_not_trained():
    # The pad id also ends answers; only the answer's own is a target.
    source = ExampleList(
        "e", np.array([7, 8, 9, 7, 9]), np.array([3, 2]), np.array([1, 1]), seed=None
    )
    batch = collate(ExampleCollator(source, pad_token_id=9, multiple_of=4), 2)
    assert batch["labels"].tolist() == [[8, 9, -100, -100], [9, -100, -100, -100]]
