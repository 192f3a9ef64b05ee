"""One `.bin/.idx` pair, one split of it, as an order of samples."""

import threading
from collections.abc import Callable, Mapping
from typing import Literal

import numpy as np

from lme_data.index_cache import cached_index, describe_index
from lme_data.indexed import CorruptDataError, IndexedTokens, bin_path
from lme_data.rows import TokenRows
from lme_data.sampling import SampleIndex, build_sample_index, build_stable_epoch, count_samples

# Mean tokens of a piece above which slices beat one gather.
_LONG_PIECE = 200


class CorpusSource:
    """Samples of a part of a corpus, in the field's order or the stable one.

    Args:
        corpus: The pair.
        name: Name in metrics and in the saved state.
        first_sequence: First sequence of the split.
        last_sequence: One past its last.
        sequence_length: Tokens of a sample, without its last label.
        seed: Seed of the order.
        order: `megatron` needs `num_samples` and depends on it; `stable` does not.
        num_samples: Samples wanted.
        vocab_size: Ids at and above it are refused; `None` checks nothing.
        split_name: `train`, `val` or `test`, for the cache.
        split: Shares as given, for the cache.
        cache_path: Folder of cached indices; `None` builds in memory.
        transform: Applied to each row after reading, with its place; for fill-in-the-middle.

    Raises:
        ValueError: If the split has too few tokens for one sample.
    """

    def __init__(
        self,
        corpus: IndexedTokens,
        *,
        name: str,
        first_sequence: int,
        last_sequence: int,
        sequence_length: int,
        seed: int,
        order: Literal["megatron", "stable"],
        num_samples: int,
        vocab_size: int | None = None,
        split_name: str = "train",
        split: str = "1",
        cache_path: str | None = None,
        transform: Callable[[np.ndarray, int], np.ndarray] | None = None,
    ) -> None:
        self._corpus = corpus
        self._name = name
        self._range = (first_sequence, last_sequence)
        self._sequence_length = sequence_length
        self._seed = seed
        self._order: Literal["megatron", "stable"] = order
        self._wanted = num_samples
        self._vocab_size = vocab_size
        self._transform = transform
        if corpus.dtype.kind not in "iu":
            raise ValueError(f"{corpus.prefix} holds {corpus.dtype}: token ids are integers")
        # Bytes to tokens; item sizes are powers of two.
        self._shift = corpus.dtype.itemsize.bit_length() - 1
        self._tokens = int(corpus.lengths[first_sequence:last_sequence].sum(dtype=np.int64))
        self._epoch_samples = count_samples(self._tokens, 1, sequence_length)
        self._epochs: dict[int, SampleIndex] = {}
        self._lock = threading.Lock()
        if self._tokens == 0 or (order == "stable" and self._epoch_samples == 0):
            raise ValueError(
                f"{corpus.prefix} ({split_name}): {self._tokens} tokens are too few for a sample of "
                f"`sequence_length` {sequence_length} and one; give more text or a shorter sequence"
            )
        if order == "megatron":
            self._index = cached_index(
                cache_path,
                describe_index(
                    path_prefix=corpus.prefix,
                    num_samples=num_samples,
                    index_split="valid" if split_name == "val" else split_name,
                    split=split,
                    random_seed=seed,
                    sequence_length=sequence_length,
                ),
                self._build,
                tokens_per_epoch=self._tokens,
                sequences_per_epoch=last_sequence - first_sequence,
            )

    @property
    def names(self) -> tuple[str, ...]:
        """The corpus's name, alone."""
        return (self._name,)

    @property
    def size(self) -> int:
        """Tokens of the split."""
        return self._tokens

    @property
    def sequence_length(self) -> int:
        """Tokens of a row, without its last label."""
        return self._sequence_length

    @property
    def num_samples(self) -> int | None:
        """Samples of the index; the stable order has no end."""
        return None if self._order == "stable" else self._index.num_samples

    @property
    def samples_per_epoch(self) -> int:
        """Samples of one pass over the tokens."""
        return self._epoch_samples

    def describe(self) -> dict[str, object]:
        """What the order depends on; paths do not count, so data may move."""
        return {
            "sequences": self._range[1] - self._range[0],
            "first_sequence": self._range[0],
            "tokens": self._tokens,
            "sequence_length": self._sequence_length,
            "seed": self._seed,
            "order": self._order,
            **({"num_samples": self._wanted} if self._order == "megatron" else {}),
        }

    def cursors(self, place: int) -> dict[str, int]:
        """The place itself."""
        return {self._name: place}

    def state(self, place: int) -> dict[str, object]:
        """Nothing but the place is needed."""
        return {}

    def restore(self, state: Mapping[str, object], place: int) -> None:
        """Nothing to take up."""

    def fetch(self, places: np.ndarray) -> TokenRows:
        """Read samples.

        Args:
            places: Which, int64, shape (rows,).

        Raises:
            IndexError: If the index has no such place.
            CorruptDataError: If a token id is not below the vocabulary's size; names the file and
                the document.
        """
        tokens = np.empty((len(places), self._sequence_length + 1), self._corpus.dtype)
        if self._order == "megatron":
            if len(places) and int(places.max()) >= self._index.num_samples:
                raise IndexError(
                    f"{self._name}: place {int(places.max())} is past the "
                    f"{self._index.num_samples} samples of its index"
                )
            self._read(self._index, places, tokens)
        else:
            epochs = places // self._epoch_samples
            for epoch in np.unique(epochs).tolist():
                chosen = np.flatnonzero(epochs == epoch)
                index = self._stable_epoch(epoch)
                if len(chosen) == len(places):
                    self._read(index, places - epoch * self._epoch_samples, tokens)
                else:
                    part = np.empty((len(chosen), tokens.shape[1]), tokens.dtype)
                    self._read(index, places[chosen] - epoch * self._epoch_samples, part)
                    tokens[chosen] = part
        if self._transform is not None:
            tokens = tokens.astype(np.int64)
            for row, place in enumerate(places.tolist()):
                tokens[row] = self._transform(tokens[row], place)
        return TokenRows(tokens, np.zeros(len(places), np.int64))

    def _build(self) -> SampleIndex:
        return build_sample_index(
            self._corpus.lengths,
            first_sequence=self._range[0],
            last_sequence=self._range[1],
            num_samples=self._wanted,
            sequence_length=self._sequence_length,
            seed=self._seed,
        )

    def _stable_epoch(self, epoch: int) -> SampleIndex:
        with self._lock:
            if epoch not in self._epochs:
                # A batch may straddle two epochs; no more are in use.
                for old in sorted(self._epochs)[:-1]:
                    del self._epochs[old]
                self._epochs[epoch] = build_stable_epoch(
                    self._corpus.lengths,
                    first_sequence=self._range[0],
                    last_sequence=self._range[1],
                    sequence_length=self._sequence_length,
                    seed=self._seed,
                    epoch=epoch,
                )
            return self._epochs[epoch]

    def _read(self, index: SampleIndex, places: np.ndarray, out: np.ndarray) -> None:
        starts, lengths, documents = self._pieces(index, places)
        flat, tokens = out.reshape(-1), self._corpus.tokens
        if len(flat) >= _LONG_PIECE * len(starts):
            pairs = zip(starts.tolist(), (starts + lengths).tolist(), strict=True)
            read = [tokens[start:end] for start, end in pairs]
            np.concatenate(read, out=flat, casting="unsafe")
        else:
            where = np.repeat(starts - (np.cumsum(lengths) - lengths), lengths)
            where += np.arange(len(flat))
            # In range by construction; checking each would cost a copy.
            np.take(tokens, where, out=flat, mode="clip")
        limit = self._vocab_size
        if limit is not None and len(flat) and int(_unsigned(flat).max()) >= limit:
            self._refuse(flat, lengths, documents)

    def _pieces(
        self, index: SampleIndex, places: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """First token, length and sequence of every piece of every sample, in order."""
        samples = index.shuffle_index[places].astype(np.int64)
        begins = index.sample_index[samples].astype(np.int64)
        ends = index.sample_index[samples + 1].astype(np.int64)
        counts = ends[:, 0] - begins[:, 0] + 1
        lasts = np.cumsum(counts) - 1
        firsts = lasts - counts + 1
        positions = np.repeat(begins[:, 0] - firsts, counts) + np.arange(int(counts.sum()))
        sequences = index.document_index[positions]
        offsets = np.zeros(len(sequences), np.int64)
        stops = self._corpus.lengths[sequences].astype(np.int64)
        offsets[firsts] = begins[:, 1]
        stops[lasts] = ends[:, 1] + 1
        starts = (self._corpus.pointers[sequences] >> self._shift) + offsets
        return starts, stops - offsets, sequences

    def _refuse(self, flat: np.ndarray, lengths: np.ndarray, sequences: np.ndarray) -> None:
        wrong = int(_unsigned(flat).argmax())
        piece = int(np.searchsorted(np.cumsum(lengths), wrong, side="right"))
        document = self._corpus.document_of(int(sequences[piece]))
        raise CorruptDataError(
            f"{bin_path(self._corpus.prefix)}: document {document} holds token id "
            f"{int(flat[wrong])}, allowed are 0 to {(self._vocab_size or 0) - 1}: the corpus was "
            "made with another tokenizer, or `vocab_size` is too small"
        )


def _unsigned(tokens: np.ndarray) -> np.ndarray:
    """The same bits without a sign: negative ids become huge, one pass finds both faults."""
    return tokens.view(f"u{tokens.dtype.itemsize}")
