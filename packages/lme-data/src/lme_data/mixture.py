"""Several sources drawn from by weight, each with a cursor of its own."""

import threading
from collections.abc import Mapping, Sequence
from typing import Generic, Literal, TypeVar

import numpy as np

from lme_data.blending import greedy_choices, places_within
from lme_data.rows import ExampleRows, ExampleSource, RowSource, TokenRows, TokenSource

# Samples whose choices are held together, and how many of them are computed at once.
_WINDOW = 1 << 16
_EXTEND_WINDOWS = 64


class Blend:
    """Choices of the greedy rule by place, without holding them all.

    Args:
        weights: Shares, summing to 1.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        self._weights = list(weights)
        self._counts = [np.zeros(len(self._weights), np.int64)]
        self._windows: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._lock = threading.Lock()

    def look_up(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Corpus and place within it of each place; int64 both, shape (rows,)."""
        choices = np.empty(len(places), np.int64)
        within = np.empty(len(places), np.int64)
        windows = places // _WINDOW
        for window in np.unique(windows).tolist():
            chosen = windows == window
            offsets = places[chosen] - window * _WINDOW
            all_choices, all_within = self._window(window)
            choices[chosen], within[chosen] = all_choices[offsets], all_within[offsets]
        return choices, within

    def counts(self, place: int) -> np.ndarray:
        """Samples of each corpus before a place, int64."""
        window, rest = divmod(place, _WINDOW)
        choices, _ = self._window(window)
        return self._counts[window] + np.bincount(choices[:rest], minlength=len(self._weights))

    def _window(self, window: int) -> tuple[np.ndarray, np.ndarray]:
        with self._lock:
            if window not in self._windows:
                self._extend(window)
                for old in sorted(self._windows)[:-1]:
                    del self._windows[old]
                choices, _ = greedy_choices(
                    self._weights,
                    _WINDOW,
                    start=window * _WINDOW,
                    counts=self._counts[window],
                )
                within = places_within(choices, len(self._weights))
                within += self._counts[window][choices]
                self._windows[window] = (choices, within)
            return self._windows[window]

    def _extend(self, window: int) -> None:
        while len(self._counts) <= window:
            done = len(self._counts) - 1
            many = min(window - done, _EXTEND_WINDOWS)
            choices, _ = greedy_choices(
                self._weights, many * _WINDOW, start=done * _WINDOW, counts=self._counts[-1]
            )
            for part in choices.reshape(many, _WINDOW):
                taken = np.bincount(part, minlength=len(self._weights))
                self._counts.append(self._counts[-1] + taken)


class Sequential:
    """Corpora one after another, each with a fixed number of samples.

    Args:
        sizes: Samples of each.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        self._ends = np.cumsum(np.asarray(sizes, np.int64))

    def look_up(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Corpus and place within it of each place; int64 both, shape (rows,)."""
        choices = np.searchsorted(self._ends, places, side="right")
        starts = np.concatenate(([0], self._ends[:-1]))
        return choices, places - starts[choices]

    def counts(self, place: int) -> np.ndarray:
        """Samples of each corpus before a place, int64."""
        starts = np.concatenate(([0], self._ends[:-1]))
        return np.clip(place - starts, 0, np.diff(np.concatenate(([0], self._ends))))


Source = TypeVar("Source", bound=RowSource)


class Mixture(Generic[Source]):
    """Which source, and which of its samples, is at each place.

    Every source has its own cursor. In the stable order the weights may change between runs: the
    new mixture begins at the place where the old one stopped and goes on with each source where
    it was.

    Args:
        sources: What is mixed; names must differ.
        weights: Shares, summing to 1; `None` takes the sources one after another (`sizes`).
        order: `megatron` refuses other weights on resume; `stable` goes on with them.
        sizes: Samples of each source, where they come one after another.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        weights: Sequence[float] | None,
        *,
        order: Literal["megatron", "stable"],
        sizes: Sequence[int] | None = None,
    ) -> None:
        self.sources = list(sources)
        self._weights = None if weights is None else [float(weight) for weight in weights]
        self._order = order
        self._sizes = None if sizes is None else list(sizes)
        self._start = 0
        self._base = np.zeros(len(self.sources), np.int64)
        self._labels = ["/".join(source.names) for source in self.sources]
        if self._weights is not None:
            self._order_of = Blend(self._weights)
        else:
            self._order_of = Sequential(self._sizes or [])
        self._first_number = np.cumsum([0, *(len(each.names) for each in self.sources)])

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all corpora of all sources."""
        return tuple(name for source in self.sources for name in source.names)

    @property
    def size(self) -> int:
        """Tokens, or examples, of all sources."""
        return sum(source.size for source in self.sources)

    @property
    def num_samples(self) -> int | None:
        """Samples there are; a weighted mixture has no end of its own."""
        return None if self._sizes is None else sum(self._sizes)

    @property
    def samples_per_epoch(self) -> int:
        """Samples of all sources together, each passed once, if there are so many."""
        total = sum(source.samples_per_epoch for source in self.sources)
        return total if self.num_samples is None else min(total, self.num_samples)

    def describe(self) -> dict[str, object]:
        """What the order depends on; in the stable order the weights may change."""
        weights = {} if self._order == "stable" else {"weights": self._weights}
        described = {
            label: source.describe()
            for label, source in zip(self._labels, self.sources, strict=True)
        }
        return {"sources": described, **weights}

    def cursors(self, place: int) -> dict[str, int]:
        """Samples already served of each corpus by a place."""
        result: dict[str, int] = {}
        for source, cursor in zip(self.sources, self._cursor_list(place), strict=True):
            result.update(source.cursors(cursor))
        return result

    def state(self, place: int) -> dict[str, object]:
        """Where this mixture began, each source's cursor there, and the weights since."""
        cursors = self._cursor_list(place)
        return {
            "start": self._start,
            "base": dict(zip(self._labels, self._base.tolist(), strict=True)),
            "weights": self._weight_table(),
            "cursors": dict(zip(self._labels, cursors, strict=True)),
            "sources": {
                label: source.state(cursor)
                for label, source, cursor in zip(self._labels, self.sources, cursors, strict=True)
            },
        }

    def restore(self, state: Mapping[str, object], place: int) -> None:
        """Go on from a place, with the weights of this run.

        Raises:
            ValueError: If the weights differ and the order is not the stable one.
        """
        base, cursors = _table(state, "base"), _table(state, "cursors")
        children = state.get("sources")
        is_same = state.get("weights") == self._weight_table()
        if not is_same and self._order != "stable":
            raise ValueError(
                f"the saved run mixed its data by {state.get('weights')}, this one by "
                f"{self._weight_table()}: go on with the saved weights, or use "
                "`class_args.order: stable`, in which weights may change"
            )
        if is_same:
            self._start = int(str(state["start"]))
            self._base = np.array([base.get(label, 0) for label in self._labels], np.int64)
        else:
            self._start = place
            self._base = np.array([cursors.get(label, 0) for label in self._labels], np.int64)
        for label, source, cursor in zip(
            self._labels, self.sources, self._cursor_list(place), strict=True
        ):
            child = children.get(label) if isinstance(children, Mapping) else None
            if isinstance(child, Mapping):
                source.restore(child, cursor)

    def look_up(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Source and place within it of each place; int64 both, shape (rows,)."""
        choices, within = self._order_of.look_up(places - self._start)
        return choices, within + self._base[choices]

    def first_number(self, source: int) -> int:
        """Number of a source's first corpus among all corpora."""
        return int(self._first_number[source])

    def _cursor_list(self, place: int) -> list[int]:
        return (self._base + self._order_of.counts(place - self._start)).tolist()

    def _weight_table(self) -> dict[str, float] | None:
        if self._weights is None:
            return None
        return dict(zip(self._labels, self._weights, strict=True))


class TokenMixture(Mixture[TokenSource]):
    """A mixture of sources whose rows have one length."""

    @property
    def sequence_length(self) -> int:
        """Tokens of a row, without its last label."""
        return self.sources[0].sequence_length

    def fetch(self, places: np.ndarray) -> TokenRows:
        """Samples at places, int64, shape (rows,)."""
        choices, within = self.look_up(places)
        tokens = np.empty((0, 0), np.int64)
        numbers = np.empty(len(places), np.int64)
        for choice in np.unique(choices).tolist():
            chosen = choices == choice
            rows = self.sources[choice].fetch(within[chosen])
            if not len(tokens):
                tokens = np.empty((len(places), rows.tokens.shape[1]), rows.tokens.dtype)
            elif tokens.dtype != rows.tokens.dtype:
                # Corpora of different dtypes: any id fits this.
                tokens = tokens.astype(np.int64)
            tokens[chosen] = rows.tokens
            numbers[chosen] = rows.source + self.first_number(choice)
        return TokenRows(tokens, numbers)


class ExampleMixture(Mixture[ExampleSource]):
    """A mixture of sources of prompts and answers."""

    def lengths(self, places: np.ndarray) -> np.ndarray:
        """Tokens of prompt and answer at places, int64."""
        choices, within = self.look_up(places)
        result = np.empty(len(places), np.int64)
        for choice in np.unique(choices).tolist():
            chosen = choices == choice
            result[chosen] = self.sources[choice].lengths(within[chosen])
        return result

    def fetch(self, places: np.ndarray) -> ExampleRows:
        """Examples at places, int64, shape (rows,)."""
        choices, within = self.look_up(places)
        tokens: list[np.ndarray] = [np.empty(0, np.int64)] * len(places)
        prompts, numbers = np.empty(len(places), np.int64), np.empty(len(places), np.int64)
        for choice in np.unique(choices).tolist():
            chosen = np.flatnonzero(choices == choice)
            rows = self.sources[choice].fetch(within[chosen])
            for row, found in zip(chosen.tolist(), rows.tokens, strict=True):
                tokens[row] = found
            prompts[chosen] = rows.prompt_lengths
            numbers[chosen] = rows.source + self.first_number(choice)
        return ExampleRows(tokens, prompts, numbers)


def _table(state: Mapping[str, object], key: str) -> dict[str, int]:
    found = state.get(key)
    return (
        {str(name): int(value) for name, value in found.items()}
        if isinstance(found, Mapping)
        else {}
    )
