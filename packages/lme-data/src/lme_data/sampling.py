"""From documents to samples of one length: the field's index, and one that never reshuffles.

A sample is `sequence_length + 1` tokens of the concatenated documents; the next begins at its last
token. Both orders are pure functions of their arguments. numpy's `RandomState` is used because its
streams are frozen: the same seed gives the same order with any numpy.
"""

import hashlib
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class SampleIndex:
    """Where each sample lies."""

    document_index: np.ndarray
    """Sequence numbers in the order in which they are concatenated, shape (epochs * sequences,)."""
    sample_index: np.ndarray
    """Position in `document_index` and offset in tokens where each sample begins, and the end of
    the last, shape (samples + 1, 2)."""
    shuffle_index: np.ndarray
    """Which sample is served at each place, shape (samples,)."""

    @property
    def num_samples(self) -> int:
        """Samples in the index."""
        return len(self.shuffle_index)


def count_samples(tokens_per_epoch: int, num_epochs: int, sequence_length: int) -> int:
    """Samples that some epochs of tokens give; one token more than they hold is needed."""
    return max(0, (num_epochs * tokens_per_epoch - 1) // sequence_length)


def count_epochs(tokens_per_epoch: int, sequence_length: int, num_samples: int) -> int:
    """Fewest whole epochs that give `num_samples` samples; at least 1.

    Raises:
        ValueError: If there are no tokens.
    """
    if tokens_per_epoch < 1:
        raise ValueError("a corpus without tokens gives no samples")
    return max(1, -(-(num_samples * sequence_length + 1) // tokens_per_epoch))


def build_sample_index(
    lengths: np.ndarray,
    *,
    first_sequence: int,
    last_sequence: int,
    num_samples: int,
    sequence_length: int,
    seed: int,
) -> SampleIndex:
    """Build the field's index of one corpus and split.

    Documents of all epochs are shuffled together, except that a last epoch of which less than four
    fifths are needed is shuffled by itself, behind the others.

    Args:
        lengths: Tokens of every sequence of the corpus, int32.
        first_sequence: First sequence of the split.
        last_sequence: One past its last.
        num_samples: Samples wanted; whole epochs are indexed, so there may be more.
        sequence_length: Tokens of a sample, without its last label.
        seed: Of the one stream that all three shuffles draw from, in order.

    Raises:
        ValueError: If the split has no tokens.

    Source: Megatron-LM's GPTDataset, as described by its published files.
    """
    tokens = int(lengths[first_sequence:last_sequence].sum(dtype=np.int64))
    num_epochs = count_epochs(tokens, sequence_length, num_samples)
    total = count_samples(tokens, num_epochs, sequence_length)
    before_last = count_samples(tokens, num_epochs - 1, sequence_length)
    is_last_apart = num_epochs > 1 and num_samples - before_last < int(
        0.8 * count_samples(tokens, 1, sequence_length)
    )
    stream = np.random.RandomState(seed)
    epoch = _sequence_numbers(first_sequence, last_sequence, num_epochs)
    if is_last_apart:
        document_index = np.tile(epoch, num_epochs)
        cut = (num_epochs - 1) * len(epoch)
        stream.shuffle(document_index[:cut])
        stream.shuffle(document_index[cut:])
    else:
        document_index = np.tile(epoch, num_epochs)
        stream.shuffle(document_index)
    sample_index = locate_samples(lengths, document_index, total, sequence_length)
    shuffle_index = np.arange(total, dtype=np.uint32 if total < 2**32 - 2 else np.int64)
    if is_last_apart:
        stream.shuffle(shuffle_index[:before_last])
        stream.shuffle(shuffle_index[before_last:])
    else:
        stream.shuffle(shuffle_index)
    return SampleIndex(document_index, sample_index, shuffle_index)


def build_stable_epoch(
    lengths: np.ndarray,
    *,
    first_sequence: int,
    last_sequence: int,
    sequence_length: int,
    seed: int,
    epoch: int,
) -> SampleIndex:
    """Build one epoch of the stable order.

    The order is an endless list: epoch 0, epoch 1, and so on, each a permutation of its own. An
    epoch depends on the corpus, the sequence length, the seed and its number, and on nothing else,
    so that more steps lengthen the list and other batch sizes cut it elsewhere; neither reorders
    it. What an epoch has over after its last whole sample is left out of it; as every epoch
    concatenates the documents in another order, it is other tokens each time.

    Args:
        lengths: Tokens of every sequence of the corpus, int32.
        first_sequence: First sequence of the split.
        last_sequence: One past its last.
        sequence_length: Tokens of a sample, without its last label.
        seed: Of the order.
        epoch: Number of the epoch, from 0.
    """
    key = hashlib.blake2b(f"lme-data stable:{seed}:{epoch}".encode(), digest_size=32).digest()
    stream = np.random.RandomState(np.frombuffer(key, "<u4"))
    document_index = _sequence_numbers(first_sequence, last_sequence, 1)
    tokens = int(lengths[first_sequence:last_sequence].sum(dtype=np.int64))
    total = count_samples(tokens, 1, sequence_length)
    stream.shuffle(document_index)
    shuffle_index = np.arange(total, dtype=np.uint32 if total < 2**32 - 2 else np.int64)
    stream.shuffle(shuffle_index)
    sample_index = locate_samples(lengths, document_index, total, sequence_length)
    return SampleIndex(document_index, sample_index, shuffle_index)


def locate_samples(
    lengths: np.ndarray, document_index: np.ndarray, num_samples: int, sequence_length: int
) -> np.ndarray:
    """Find where each sample begins: sample j at token `j * sequence_length` of the concatenation.

    Args:
        lengths: Tokens of every sequence, int32.
        document_index: Order of concatenation, int32 or int64.
        num_samples: Samples to locate.
        sequence_length: Tokens from one sample to the next.

    Returns:
        Shape (samples + 1, 2), dtype of `document_index`: position in `document_index`, offset in
        tokens; the last row is the last token of the last sample.
    """
    ends = np.cumsum(lengths[document_index], dtype=np.int64)
    begins = np.arange(num_samples + 1, dtype=np.int64) * sequence_length
    # The first document whose end lies beyond the token holds it; empty ones never do.
    positions = np.searchsorted(ends, begins, side="right")
    sample_index = np.empty((num_samples + 1, 2), document_index.dtype)
    sample_index[:, 0] = positions
    sample_index[:, 1] = begins - np.where(positions > 0, ends[positions - 1], 0)
    # The field's walk begins at the first document even if that is empty.
    sample_index[0] = 0
    return sample_index


def _sequence_numbers(first: int, last: int, num_epochs: int) -> np.ndarray:
    is_small = last < 2**31 and (last - first) * num_epochs < 2**31
    return np.arange(first, last, dtype=np.int32 if is_small else np.int64)
