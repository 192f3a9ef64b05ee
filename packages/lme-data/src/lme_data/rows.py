"""What datasets hand to collation: rows of tokens, or prompts with answers."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np


@dataclass(frozen=True, slots=True)
class TokenRows:
    """Samples of one length."""

    tokens: np.ndarray
    """Integers of the dtype on disk, shape (rows, sequence_length + 1)."""
    source: np.ndarray
    """Which corpus each row is from, int64, shape (rows,)."""


@dataclass(frozen=True, slots=True)
class ExampleRows:
    """Prompts with their answers, of various lengths."""

    tokens: list[np.ndarray]
    """Prompt and answer of each row, int64."""
    prompt_lengths: np.ndarray
    """Tokens of each prompt, int64, shape (rows,)."""
    source: np.ndarray
    """Which dataset each row is from, int64, shape (rows,)."""


class RowSource(Protocol):
    """An order of samples, by place: what training serves first, second, and so on.

    Places never repeat a sample within an epoch, and what is at a place is a pure function of the
    source, so that a position in the data is one integer.
    """

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the corpora, in the order of `source` numbers."""
        ...

    @property
    def size(self) -> int:
        """Tokens, or examples where there are no samples of one length, of an epoch."""
        ...

    @property
    def num_samples(self) -> int | None:
        """Samples there are; `None` is no end."""
        ...

    @property
    def samples_per_epoch(self) -> int:
        """Samples in which nothing is repeated."""
        ...

    def describe(self) -> dict[str, object]:
        """What the order depends on, as JSON."""
        ...

    def cursors(self, place: int) -> dict[str, int]:
        """Samples already served of each corpus by a place."""
        ...

    def state(self, place: int) -> dict[str, object]:
        """What must be kept to go on from a place, besides the place itself."""
        ...

    def restore(self, state: Mapping[str, object], place: int) -> None:
        """Take up an earlier state at a place.

        Raises:
            ValueError: If this source cannot go on from there; says what differs and what to do.
        """
        ...


class TokenSource(RowSource, Protocol):
    """Rows of one length."""

    @property
    def sequence_length(self) -> int:
        """Tokens of a row, without its last label."""
        ...

    def fetch(self, places: np.ndarray) -> TokenRows:
        """Samples at places, int64, shape (rows,)."""
        ...


class ExampleSource(RowSource, Protocol):
    """Prompts with answers."""

    def lengths(self, places: np.ndarray) -> np.ndarray:
        """Tokens of prompt and answer at places, int64, without fetching them."""
        ...

    def fetch(self, places: np.ndarray) -> ExampleRows:
        """Examples at places, int64, shape (rows,)."""
        ...
