"""Made-up tokens, to try a run without data."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from lme_data.context import DataContext, SplitName
from lme_data.dataset.base import check_entry
from lme_data.rows import ExampleRows, ExampleSource, TokenRows, TokenSource


@dataclass(frozen=True, slots=True, kw_only=True)
class DebugClassArgs:
    """Settings of a DebugDataset."""

    num_examples: int
    """Examples of an epoch."""
    token_id: int | None = None
    """The token every static example is made of; absent: the end-of-text token, else 0."""
    static_examples: bool = True
    """All examples alike; false: example i differs from every other."""
    sequence_length: int | None = None
    """Tokens of a pretraining sample; required for pretraining."""
    eval_steps: int | None = None
    """Global batches of one evaluation; absent: 10."""
    num_workers: int = 0
    """Threads that prepare batches ahead; 0 prepares them when asked."""

    def __post_init__(self) -> None:
        if self.num_examples < 1:
            raise ValueError(f"`num_examples` must be at least 1, got {self.num_examples}")
        if self.token_id is not None and self.token_id < 0:
            raise ValueError(f"`token_id` must be 0 or more, got {self.token_id}")
        if self.sequence_length is not None and self.sequence_length < 1:
            raise ValueError(f"`sequence_length` must be at least 1, got {self.sequence_length}")
        if self.eval_steps is not None and self.eval_steps < 0:
            raise ValueError(f"`eval_steps` must be 0 or more, got {self.eval_steps}")
        if self.num_workers < 0:
            raise ValueError(f"`num_workers` must be 0 or more, got {self.num_workers}")


@dataclass(frozen=True, slots=True, kw_only=True)
class DebugDatasetArgs:
    """Made-up tokens, for pretraining (with `sequence_length`) and finetuning."""

    class_name: Literal["DebugDataset"] = "DebugDataset"
    """Kind of the dataset."""
    data_name: str
    """Name of the dataset in metrics; unique in the list."""
    class_args: DebugClassArgs
    """What the examples look like."""
    data_sampling_ratio: float | None = None
    """Share of the mixture where several datasets are given; any positive number."""
    input_format: str = "__input__"
    """Must be left as it is: there is no text."""
    output_format: str = "__output__"
    """Must be left as it is: there is no text."""
    max_input_tokens: int | None = None
    """Tokens of a finetuning prompt; required for finetuning."""
    max_output_tokens: int | None = None
    """Tokens of a finetuning answer, its end-of-text token included; required for finetuning."""

    def __post_init__(self) -> None:
        limits = {
            "max_input_tokens": self.max_input_tokens,
            "max_output_tokens": self.max_output_tokens,
        }
        check_entry(self.data_name, self.data_sampling_ratio, limits)
        if (self.input_format, self.output_format) != ("__input__", "__output__"):
            raise ValueError(
                f"`input_format` and `output_format` of `{self.data_name}` must be left out: "
                "`DebugDataset` has no text"
            )

    def count_tokens(self, split: SplitName) -> int:
        """Tokens of an epoch; every split has the same ones."""
        return self.class_args.num_examples * (self.class_args.sequence_length or 0)

    def open_tokens(
        self, split: SplitName, num_samples: int, context: DataContext
    ) -> TokenSource | None:
        """Samples of one length, for pretraining; every split has the same ones.

        Args:
            split: Has no effect.
            num_samples: Has no effect: examples repeat.
            context: Gives the vocabulary and the end of text.

        Raises:
            ValueError: If `sequence_length` is missing or a token is outside the vocabulary.
        """
        if self.class_args.sequence_length is None:
            raise ValueError(
                f"`class_args.sequence_length` of `{self.data_name}` is required for pretraining"
            )
        return DebugTokens(self, self.class_args.sequence_length, context)

    def open_examples(self, split: SplitName, context: DataContext) -> ExampleSource | None:
        """Prompts and answers, for finetuning; every split has the same ones.

        Args:
            split: Has no effect.
            context: Gives the vocabulary and the end of text.

        Raises:
            ValueError: If a limit is missing or a token is outside the vocabulary.
        """
        if self.max_input_tokens is None or self.max_output_tokens is None:
            raise ValueError(
                f"`max_input_tokens` and `max_output_tokens` of `{self.data_name}` are required "
                "for finetuning: they are the lengths of its prompts and answers"
            )
        return DebugExamples(self, self.max_input_tokens, self.max_output_tokens, context)


class _DebugSource:
    """What made-up samples and examples share."""

    def __init__(self, args: DebugDatasetArgs, context: DataContext) -> None:
        self._args = args
        self._static = args.class_args.static_examples
        token_id = args.class_args.token_id
        self._token = token_id if token_id is not None else (context.eos_token_id or 0)
        self._vocab_size = context.vocab_size or self._token + 1
        self._eos = context.eos_token_id
        if self._token >= self._vocab_size:
            raise ValueError(
                f"`token_id` {self._token} of `{args.data_name}` must be below the vocabulary's "
                f"size {self._vocab_size}"
            )

    @property
    def names(self) -> tuple[str, ...]:
        """The dataset's name, alone."""
        return (self._args.data_name,)

    @property
    def num_samples(self) -> int | None:
        """No end: examples repeat."""
        return None

    @property
    def samples_per_epoch(self) -> int:
        """Examples of an epoch."""
        return self._args.class_args.num_examples

    def describe(self) -> dict[str, object]:
        """What the examples depend on."""
        return {
            "num_examples": self._args.class_args.num_examples,
            "token_id": self._token,
            "static_examples": self._static,
        }

    def cursors(self, place: int) -> dict[str, int]:
        """The place itself."""
        return {self._args.data_name: place}

    def state(self, place: int) -> dict[str, object]:
        """Nothing but the place is needed."""
        return {}

    def restore(self, state: Mapping[str, object], place: int) -> None:
        """Nothing to take up."""


class DebugTokens(_DebugSource):
    """Rows of one token, or of numbers that count up from a start of each row's own.

    Args:
        args: The entry.
        sequence_length: Tokens of a row, without its last label.
        context: Gives the vocabulary.
    """

    def __init__(self, args: DebugDatasetArgs, sequence_length: int, context: DataContext) -> None:
        super().__init__(args, context)
        self.sequence_length = sequence_length

    @property
    def size(self) -> int:
        """Tokens of an epoch."""
        return self.samples_per_epoch * self.sequence_length

    def fetch(self, places: np.ndarray) -> TokenRows:
        """Samples at places, int64, shape (rows,)."""
        columns = np.arange(self.sequence_length + 1, dtype=np.int64)
        if self._static:
            tokens = np.full((len(places), len(columns)), self._token, np.int64)
        else:
            # A multiplier without common factor spreads the starts over the vocabulary.
            starts = (places % self.samples_per_epoch) * 7919
            tokens = (starts[:, None] + columns) % self._vocab_size
        return TokenRows(tokens, np.zeros(len(places), np.int64))


class DebugExamples(_DebugSource):
    """Prompts and answers of one token each; not static: the token is the example's number.

    Args:
        args: The entry.
        input_tokens: Tokens of a prompt.
        output_tokens: Tokens of an answer.
        context: Gives the vocabulary.
    """

    def __init__(
        self, args: DebugDatasetArgs, input_tokens: int, output_tokens: int, context: DataContext
    ) -> None:
        super().__init__(args, context)
        self._input_tokens = input_tokens
        self._output_tokens = output_tokens

    @property
    def size(self) -> int:
        """Examples of an epoch."""
        return self.samples_per_epoch

    def lengths(self, places: np.ndarray) -> np.ndarray:
        """Tokens of prompt and answer at places, int64."""
        return np.full(len(places), self._input_tokens + self._output_tokens, np.int64)

    def fetch(self, places: np.ndarray) -> ExampleRows:
        """Examples at places, int64, shape (rows,)."""
        length = self._input_tokens + self._output_tokens
        numbers = (places % self.samples_per_epoch) % self._vocab_size
        tokens = [
            np.full(length, self._token if self._static else number, np.int64)
            for number in numbers.tolist()
        ]
        prompts = np.full(len(places), self._input_tokens, np.int64)
        return ExampleRows(tokens, prompts, np.zeros(len(places), np.int64))
