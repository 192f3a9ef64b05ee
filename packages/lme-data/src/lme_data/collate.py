"""From rows of numpy to the batches of tensors that training takes."""

from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from lme_data.packing import document_offsets, document_positions, ignore_last_labels
from lme_data.rows import ExampleSource, TokenSource

Batch = dict[str, Tensor]
"""`input_ids`, `labels`, `token_index`, `source`, and where they apply `cu_seqlens`,
`position_ids`, `valid`."""
Collate = Callable[[np.ndarray, np.ndarray, np.ndarray], Batch]
"""(places of all rows of the global batch, rows of it wanted, which of them count) to a batch."""

IGNORE_INDEX = -100
"""Label of what is not trained."""


class TokenCollator:
    """Batches of rows of one length.

    Args:
        source: Where rows come from.
        eos_token_id: End of text; needed where documents are kept apart.
        reset_attention_mask: Keep documents apart: adds `cu_seqlens` and `position_ids`, and
            ignores the label of each document's last token.
        reset_position_ids: Number the tokens of each document from 0.

    Raises:
        ValueError: If the two settings contradict each other, or the end of text is not known.
    """

    def __init__(
        self,
        source: TokenSource,
        *,
        eos_token_id: int | None = None,
        reset_attention_mask: bool = False,
        reset_position_ids: bool = False,
    ) -> None:
        if reset_position_ids and not reset_attention_mask:
            raise ValueError("`reset_position_ids` needs `reset_attention_mask: true`")
        if reset_attention_mask and eos_token_id is None:
            raise ValueError(
                "`reset_attention_mask` needs to know the end-of-text token: give "
                "`tokenizer_args.tokenizer_name`, or data whose manifest names its tokenizer"
            )
        self._source = source
        self._eos = eos_token_id if reset_attention_mask else None
        self._reset_position_ids = reset_position_ids
        # Pure functions of their key; shared by all batches, which are not written to.
        self._token_index: dict[tuple[int, int, int], Tensor] = {}

    def __call__(self, places: np.ndarray, rows: np.ndarray, counted: np.ndarray) -> Batch:
        """Read and shape the wanted rows of a global batch.

        Args:
            places: Place of every row of the global batch, int64.
            rows: Which of them to make, int64.
            counted: Which of the wanted rows count, bool; the others get no labels.
        """
        found = self._source.fetch(places[rows])
        input_ids = found.tokens[:, :-1].astype(np.int64, order="C")
        labels = found.tokens[:, 1:].astype(np.int64, order="C")
        if not counted.all():
            labels[~counted] = IGNORE_INDEX
        batch = {
            "input_ids": torch.from_numpy(input_ids),
            "labels": torch.from_numpy(labels),
            "token_index": self._index(rows, input_ids.shape[1]),
            "source": torch.from_numpy(found.source),
        }
        if self._eos is not None:
            ignore_last_labels(labels, input_ids, self._eos, IGNORE_INDEX)
            offsets = document_offsets(input_ids, self._eos)
            if self._reset_position_ids:
                positions = document_positions(offsets).reshape(input_ids.shape)
            else:
                positions = np.tile(np.arange(input_ids.shape[1]), (len(rows), 1))
            batch["cu_seqlens"] = torch.from_numpy(offsets)
            batch["position_ids"] = torch.from_numpy(positions)
        return batch

    def _index(self, rows: np.ndarray, length: int) -> Tensor:
        key = (int(rows[0]), int(rows[-1]), length)
        index = self._token_index.get(key)
        if index is None or len(index) != len(rows):
            index = torch.from_numpy(token_index(rows, length))
            self._token_index[key] = index
        return index


class ExampleCollator:
    """Right-padded batches of prompts and answers.

    All micro batches of a global batch are padded to one length, that of its longest example
    rounded up, so that any cut of the global batch sees the same tokens at the same indices.

    Args:
        source: Where examples come from.
        pad_token_id: What rows are filled with; it is never trained.
        loss_mask: `output_only` trains the answer, `no_mask` the prompt too.
        multiple_of: Rows are padded to a multiple of this.
    """

    def __init__(
        self,
        source: ExampleSource,
        *,
        pad_token_id: int,
        loss_mask: Literal["output_only", "no_mask"] = "output_only",
        multiple_of: int = 8,
    ) -> None:
        self._source = source
        self._pad = pad_token_id
        self._loss_mask = loss_mask
        self._multiple_of = multiple_of

    def __call__(self, places: np.ndarray, rows: np.ndarray, counted: np.ndarray) -> Batch:
        """Read, label and pad the wanted rows of a global batch.

        Args:
            places: Place of every row of the global batch, int64.
            rows: Which of them to make, int64.
            counted: Which of the wanted rows count, bool; the others get no labels.
        """
        longest = int(self._source.lengths(places).max())
        length = -(-longest // self._multiple_of) * self._multiple_of
        found = self._source.fetch(places[rows])
        sizes = np.array([len(tokens) for tokens in found.tokens], np.int64)
        columns = np.arange(length)
        valid = columns < sizes[:, None]
        input_ids = np.full((len(rows), length), self._pad, np.int64)
        input_ids[valid] = np.concatenate(found.tokens)
        labels = np.full((len(rows), length), IGNORE_INDEX, np.int64)
        labels[:, :-1] = input_ids[:, 1:]
        first = 1 if self._loss_mask == "no_mask" else np.maximum(found.prompt_lengths, 1)[:, None]
        # The label in column c is the token of column c + 1.
        is_target = (columns + 1 >= first) & (columns + 1 < sizes[:, None]) & counted[:, None]
        labels[~is_target] = IGNORE_INDEX
        batch = {
            "input_ids": torch.from_numpy(input_ids),
            "labels": torch.from_numpy(labels),
            "token_index": torch.from_numpy(token_index(rows, length)),
            "source": torch.from_numpy(found.source),
        }
        if not valid.all():
            batch["valid"] = torch.from_numpy(valid)
        return batch


def token_index(rows: np.ndarray, length: int) -> np.ndarray:
    """Position of every token in the global batch.

    Args:
        rows: Rows of the global batch, int64, shape (B,).
        length: Tokens of a row, S.

    Returns:
        `row * S + column`, int64, shape (B, S).
    """
    return rows[:, None] * length + np.arange(length, dtype=np.int64)
