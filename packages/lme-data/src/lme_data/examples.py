"""Prompts and answers in memory, as an order of examples."""

import hashlib
import threading
from collections.abc import Mapping, Sequence

import numpy as np

from lme_data.context import DataContext
from lme_data.rows import ExampleRows

_ENCODE_AT_ONCE = 1000


def tokenize_examples(
    name: str,
    texts: Sequence[tuple[str, str]],
    context: DataContext,
    *,
    input_format: str,
    output_format: str,
    max_input_tokens: int | None,
    max_output_tokens: int | None,
    seed: int | None,
) -> "ExampleList":
    """Tokenise prompts and answers; every answer ends with the end-of-text token.

    Args:
        name: Of the dataset, for metrics and errors.
        texts: Prompt and answer of each example.
        context: Gives the tokenizer and the vocabulary.
        input_format: The first `__input__` in it is replaced by the prompt.
        output_format: The first `__output__` in it is replaced by the answer.
        max_input_tokens: Longest prompt; the rest is cut.
        max_output_tokens: Longest answer, its end-of-text token included; the rest is cut.
        seed: Seed of the order; `None` keeps the order of the texts.

    Raises:
        ValueError: If there is no tokenizer, it has no end-of-text token, or an id is outside the
            vocabulary.
    """
    tokenizer = context.tokenizer
    if tokenizer is None or context.eos_token_id is None:
        raise ValueError(
            f"`{name}` needs a tokenizer with an end-of-text token: give "
            "`tokenizer_args.tokenizer_name`"
        )
    room = None if max_output_tokens is None else max_output_tokens - 1
    pieces: list[list[int]] = []
    prompts = np.empty(len(texts), np.int64)
    for start in range(0, len(texts), _ENCODE_AT_ONCE):
        part = texts[start : start + _ENCODE_AT_ONCE]
        inputs = tokenizer.encode_batch([input_format.replace("__input__", a, 1) for a, _ in part])
        outputs = tokenizer.encode_batch(
            [output_format.replace("__output__", b, 1) for _, b in part]
        )
        for row, (prompt, answer) in enumerate(zip(inputs, outputs, strict=True), start):
            kept = prompt[:max_input_tokens]
            prompts[row] = len(kept)
            pieces.append([*kept, *answer[:room], context.eos_token_id])
    lengths = np.array([len(piece) for piece in pieces], np.int64)
    tokens = np.fromiter((i for piece in pieces for i in piece), np.int32, int(lengths.sum()))
    if context.vocab_size is not None and len(tokens) and tokens.max() >= context.vocab_size:
        row = int(np.searchsorted(np.cumsum(lengths), int(tokens.argmax()), side="right"))
        raise ValueError(
            f"`{name}`: example {row} holds token id {int(tokens.max())}, `vocab_size` is "
            f"{context.vocab_size}: the tokenizer does not belong to the model"
        )
    return ExampleList(name, tokens, lengths, prompts, seed=seed)


class ExampleList:
    """Tokenised prompts and answers, shuffled anew each epoch or in their own order.

    Args:
        name: Name in metrics and in the saved state.
        tokens: Prompts and answers of all examples, one after another, int32.
        lengths: Tokens of each example, int64, shape (examples,).
        prompt_lengths: Tokens of each prompt, int64, shape (examples,).
        seed: Seed of the order; `None` keeps the order of the data.
    """

    def __init__(
        self,
        name: str,
        tokens: np.ndarray,
        lengths: np.ndarray,
        prompt_lengths: np.ndarray,
        *,
        seed: int | None,
    ) -> None:
        self._name = name
        self._tokens = tokens
        self._starts = np.cumsum(lengths) - lengths
        self._lengths = lengths
        self._prompts = prompt_lengths
        self._seed = seed
        self._orders: dict[int, np.ndarray] = {}
        self._lock = threading.Lock()

    @property
    def names(self) -> tuple[str, ...]:
        """The dataset's name, alone."""
        return (self._name,)

    @property
    def size(self) -> int:
        """Examples."""
        return len(self._lengths)

    @property
    def num_samples(self) -> int | None:
        """No end: epochs follow one another."""
        return None

    @property
    def samples_per_epoch(self) -> int:
        """Examples."""
        return len(self._lengths)

    def describe(self) -> dict[str, object]:
        """What the order depends on."""
        return {"examples": self.size, "tokens": len(self._tokens), "seed": self._seed}

    def cursors(self, place: int) -> dict[str, int]:
        """The place itself."""
        return {self._name: place}

    def state(self, place: int) -> dict[str, object]:
        """Nothing but the place is needed."""
        return {}

    def restore(self, state: Mapping[str, object], place: int) -> None:
        """Nothing to take up."""

    def lengths(self, places: np.ndarray) -> np.ndarray:
        """Tokens of prompt and answer at places, int64."""
        return self._lengths[self._numbers(places)]

    def fetch(self, places: np.ndarray) -> ExampleRows:
        """Examples at places, int64, shape (rows,)."""
        numbers = self._numbers(places)
        starts = self._starts[numbers].tolist()
        ends = (self._starts + self._lengths)[numbers].tolist()
        tokens = [
            self._tokens[start:end].astype(np.int64)
            for start, end in zip(starts, ends, strict=True)
        ]
        return ExampleRows(tokens, self._prompts[numbers], np.zeros(len(places), np.int64))

    def _numbers(self, places: np.ndarray) -> np.ndarray:
        epochs, within = np.divmod(places, self.size)
        if self._seed is None:
            return within
        numbers = np.empty(len(places), np.int64)
        for epoch in np.unique(epochs).tolist():
            chosen = epochs == epoch
            numbers[chosen] = self._order(epoch)[within[chosen]]
        return numbers

    def _order(self, epoch: int) -> np.ndarray:
        with self._lock:
            if epoch not in self._orders:
                for old in sorted(self._orders)[:-1]:
                    del self._orders[old]
                text = f"lme-data examples:{self._seed}:{epoch}".encode()
                key = np.frombuffer(hashlib.blake2b(text, digest_size=32).digest(), "<u4")
                self._orders[epoch] = np.random.RandomState(key).permutation(self.size)
            return self._orders[epoch]
