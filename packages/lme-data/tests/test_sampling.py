"""The sample index against published values and against the walk it replaces."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lme_data.sampling import (
    build_sample_index,
    build_stable_epoch,
    count_epochs,
    count_samples,
)

LENGTHS = np.array([3, 5, 2, 7], np.int32)

# Produced by the system whose files we read: lengths 3 5 2 7, four tokens a sample, seed 1234.
GOLDEN = {
    4: (
        [0, 1, 2, 3],
        [(0, 0), (1, 1), (2, 0), (3, 2), (3, 6)],
        [1, 2, 3, 0],
    ),
    5: (
        [0, 1, 2, 3, 1, 2, 3, 0],
        [(0, 0), (1, 1), (2, 0), (3, 2), (3, 6), (4, 3), (6, 0), (6, 4), (7, 1)],
        [0, 2, 3, 1, 7, 4, 6, 5],
    ),
    9: (
        [2, 1, 2, 0, 0, 1, 3, 3, 0, 2, 1, 3],
        [
            (0, 0), (1, 2), (2, 1), (4, 0), (5, 1), (6, 0), (6, 4), (7, 1), (7, 5), (8, 2),
            (10, 1), (11, 0), (11, 4),
        ],
        [7, 5, 6, 0, 4, 3, 2, 1, 9, 11, 8, 10],
    ),
}  # fmt: skip


@pytest.mark.parametrize("num_samples", GOLDEN)
def test_index_equals_the_published_one(num_samples):
    documents, samples, shuffle = GOLDEN[num_samples]
    index = build_sample_index(
        LENGTHS,
        first_sequence=0,
        last_sequence=4,
        num_samples=num_samples,
        sequence_length=4,
        seed=1234,
    )
    assert index.document_index.tolist() == documents
    assert [tuple(row) for row in index.sample_index.tolist()] == samples
    assert index.shuffle_index.tolist() == shuffle
    assert index.shuffle_index.dtype == np.uint32
    assert index.document_index.dtype == index.sample_index.dtype == np.int32


def walk(lengths, documents, num_samples, sequence_length):
    """Follow the documents token by token, as the field's builder does."""
    samples = [(0, 0)]
    position, offset = 0, 0
    for _ in range(num_samples):
        remaining = sequence_length + 1
        while remaining:
            left = lengths[documents[position]] - offset
            remaining -= left
            if remaining <= 0:
                offset += remaining + left - 1
                remaining = 0
            else:
                position += 1
                offset = 0
        samples.append((position, offset))
    return samples


def naive_index(lengths, first, last, num_samples, sequence_length, seed):
    """The field's construction, written with loops and lists."""
    tokens = sum(lengths[first:last])
    epochs = 1
    while (epochs * tokens - 1) // sequence_length < num_samples:
        epochs += 1
    total = (epochs * tokens - 1) // sequence_length
    before = ((epochs - 1) * tokens - 1) // sequence_length
    apart = epochs > 1 and num_samples - before < int(0.8 * ((tokens - 1) // sequence_length))
    stream = np.random.RandomState(seed)

    def shuffled(numbers):
        array = np.array(numbers, np.int64)
        stream.shuffle(array)
        return array.tolist()

    once = list(range(first, last))
    blocks = [once * (epochs - 1), once] if apart else [once * epochs]
    documents = [number for block in blocks for number in shuffled(block)]
    samples = walk(lengths, documents, total, sequence_length)
    if apart:
        shuffle = shuffled(range(before)) + shuffled(range(before, total))
    else:
        shuffle = shuffled(range(total))
    return documents, samples, shuffle


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=25),
    cut=st.tuples(st.integers(0, 5), st.integers(0, 5)),
    num_samples=st.integers(1, 60),
    sequence_length=st.integers(1, 17),
    seed=st.integers(0, 2**32 - 1),
)
def test_index_equals_the_walk(lengths, cut, num_samples, sequence_length, seed):
    first, last = cut[0], len(lengths) - cut[1]
    if first >= last or sum(lengths[first:last]) == 0:
        return
    index = build_sample_index(
        np.array(lengths, np.int32),
        first_sequence=first,
        last_sequence=last,
        num_samples=num_samples,
        sequence_length=sequence_length,
        seed=seed,
    )
    documents, samples, shuffle = naive_index(
        lengths, first, last, num_samples, sequence_length, seed
    )
    assert index.document_index.tolist() == documents
    assert [tuple(row) for row in index.sample_index.tolist()] == samples
    assert index.shuffle_index.tolist() == shuffle


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    tokens=st.integers(1, 10**13),
    sequence_length=st.integers(1, 10**6),
    num_samples=st.integers(1, 10**9),
)
def test_epochs_are_the_fewest_that_suffice(tokens, sequence_length, num_samples):
    epochs = count_epochs(tokens, sequence_length, num_samples)
    assert count_samples(tokens, epochs, sequence_length) >= num_samples
    assert epochs == 1 or count_samples(tokens, epochs - 1, sequence_length) < num_samples


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=25),
    sequence_length=st.integers(1, 9),
    seed=st.integers(0, 2**32 - 1),
    epoch=st.integers(0, 5),
)
def test_stable_epoch_serves_every_sample_once(lengths, sequence_length, seed, epoch):
    index = build_stable_epoch(
        np.array(lengths, np.int32),
        first_sequence=0,
        last_sequence=len(lengths),
        sequence_length=sequence_length,
        seed=seed,
        epoch=epoch,
    )
    total = max(0, (sum(lengths) - 1) // sequence_length)
    assert sorted(index.document_index.tolist()) == list(range(len(lengths)))
    assert sorted(index.shuffle_index.tolist()) == list(range(total))
    expected = walk(lengths, index.document_index.tolist(), total, sequence_length)
    assert [tuple(row) for row in index.sample_index.tolist()] == expected


def test_stable_epochs_differ_from_each_other():
    orders = {
        tuple(
            build_stable_epoch(
                np.full(50, 10, np.int32),
                first_sequence=0,
                last_sequence=50,
                sequence_length=4,
                seed=1,
                epoch=epoch,
            ).document_index.tolist()
        )
        for epoch in range(4)
    }
    assert len(orders) == 4


def test_corpus_without_tokens_is_refused():
    with pytest.raises(ValueError, match="without tokens"):
        build_sample_index(
            np.zeros(3, np.int32),
            first_sequence=0,
            last_sequence=3,
            num_samples=1,
            sequence_length=4,
            seed=0,
        )
