"""Samples of a corpus against concatenating its documents by hand."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lme_data.corpus import CorpusSource
from lme_data.indexed import CorruptDataError, IndexedTokens
from lme_data.sampling import build_sample_index, build_stable_epoch


def open_corpus(prefix, order="megatron", **settings_):
    chosen = {
        "name": "c",
        "first_sequence": 0,
        "last_sequence": IndexedTokens(prefix).num_sequences,
        "sequence_length": 8,
        "seed": 3,
        "num_samples": 10,
        **settings_,
    }
    return CorpusSource(IndexedTokens(prefix), order=order, **chosen)


def by_hand(pair, index, place, sequence_length):
    stream = np.concatenate([pair.sequence(number) for number in index.document_index.tolist()])
    begin = int(index.shuffle_index[place]) * sequence_length
    return stream[begin : begin + sequence_length + 1].tolist()


@settings(
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    max_examples=40,
)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=12),
    # Long samples are read by slices, short pieces by one gather.
    sequence_length=st.sampled_from([1, 3, 8, 700]),
    seed=st.integers(0, 1000),
)
def test_samples_are_cut_from_the_concatenated_documents(
    write_corpus, lengths, sequence_length, seed
):
    if sum(lengths) < 2:
        return
    scale = 40 if sequence_length == 700 else 1
    lengths = [length * scale for length in lengths]
    prefix = write_corpus(lengths)
    source = open_corpus(prefix, sequence_length=sequence_length, seed=seed)
    pair = IndexedTokens(prefix)
    index = build_sample_index(
        pair.lengths,
        first_sequence=0,
        last_sequence=len(lengths),
        num_samples=10,
        sequence_length=sequence_length,
        seed=seed,
    )
    rows = source.fetch(np.arange(10)).tokens
    for place in range(10):
        assert rows[place].tolist() == by_hand(pair, index, place, sequence_length)


def test_stable_order_runs_through_its_epochs(write_corpus):
    prefix = write_corpus([7, 12, 30, 5, 9])
    source = open_corpus(prefix, "stable")
    pair = IndexedTokens(prefix)
    per_epoch = (63 - 1) // 8
    assert source.samples_per_epoch == per_epoch
    # One batch straddles two epochs.
    rows = source.fetch(np.arange(3 * per_epoch)).tokens
    for place in range(3 * per_epoch):
        index = build_stable_epoch(
            pair.lengths,
            first_sequence=0,
            last_sequence=5,
            sequence_length=8,
            seed=3,
            epoch=place // per_epoch,
        )
        assert rows[place].tolist() == by_hand(pair, index, place % per_epoch, 8)


def test_stable_order_does_not_depend_on_how_many_samples_are_wanted(write_corpus):
    prefix = write_corpus([7, 12, 30, 5, 9])
    places = np.arange(20)
    few, many = (open_corpus(prefix, "stable", num_samples=n).fetch(places) for n in (5, 5000))
    assert (few.tokens == many.tokens).all()
    few, many = (open_corpus(prefix, num_samples=n).fetch(np.arange(5)) for n in (5, 5000))
    assert (few.tokens != many.tokens).any()


@pytest.mark.parametrize("order", ["megatron", "stable"])
@pytest.mark.parametrize("length", [3, 900], ids=["gather", "slices"])
def test_id_outside_the_vocabulary_names_file_and_document(write_corpus, order, length):
    # Ids count up over the corpus; the largest are in the last document.
    prefix = write_corpus([length] * 4)
    source = open_corpus(prefix, order, sequence_length=length, vocab_size=4 * length - 1)
    with pytest.raises(CorruptDataError) as error:
        source.fetch(np.arange(10))
    message = str(error.value)
    assert "corpus.bin: document 3 holds" in message
    assert f"token id {4 * length - 1}, allowed are 0 to {4 * length - 2}" in message


def test_negative_id_is_refused(tmp_path, write_corpus):
    prefix = write_corpus([20], dtype="<i4")
    with open(f"{prefix}.bin", "r+b") as file:  # noqa: PTH123
        file.seek(4 * 7)
        file.write((-5).to_bytes(4, "little", signed=True))
    source = open_corpus(prefix, vocab_size=100)
    with pytest.raises(CorruptDataError, match="token id -5"):
        source.fetch(np.arange(10))


def test_part_of_the_corpus_is_all_that_is_served(write_corpus):
    prefix = write_corpus([10] * 10)
    source = open_corpus(prefix, first_sequence=4, last_sequence=7, sequence_length=5)
    assert set(source.fetch(np.arange(10)).tokens.reshape(-1).tolist()) <= set(range(40, 70))


def test_too_few_tokens_are_refused(write_corpus):
    prefix = write_corpus([8])
    with pytest.raises(ValueError, match="8 tokens are too few"):
        open_corpus(prefix, "stable")
    assert open_corpus(prefix).fetch(np.arange(2)).tokens.shape == (2, 9)


def test_place_past_the_index_is_an_error(write_corpus):
    with pytest.raises(IndexError, match="past the"):
        open_corpus(write_corpus([50])).fetch(np.array([10_000]))
