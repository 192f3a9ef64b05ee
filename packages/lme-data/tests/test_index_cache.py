"""Cached indices: equal to built ones, rebuilt where they do not fit or are damaged."""

import hashlib
import json

import numpy as np
import pytest

from lme_data.corpus import CorpusSource
from lme_data.index_cache import describe_index
from lme_data.indexed import IndexedTokens


@pytest.fixture
def open_cached(tmp_path, write_corpus):
    def open_(lengths):
        return CorpusSource(
            IndexedTokens(write_corpus(lengths)),
            name="c",
            first_sequence=0,
            last_sequence=len(lengths),
            sequence_length=4,
            seed=3,
            order="megatron",
            num_samples=10,
            cache_path=str(tmp_path / "cache"),
        )

    return open_


def test_cached_index_serves_the_same_samples(open_cached, tmp_path):
    places = np.arange(10)
    built = open_cached([9, 8, 7]).fetch(places).tokens
    files = sorted(path.name for path in (tmp_path / "cache").iterdir())
    assert [name.split("-", 1)[1] for name in files] == [
        "GPTDataset-description.txt",
        "GPTDataset-document_index.npy",
        "GPTDataset-sample_index.npy",
        "GPTDataset-shuffle_index.npy",
    ]
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}
    assert (open_cached([9, 8, 7]).fetch(places).tokens == built).all()
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}
    assert before == after


def test_file_name_is_the_md5_of_the_description(open_cached, tmp_path):
    open_cached([9, 8, 7])
    text = describe_index(
        path_prefix=str(tmp_path / "corpus"),
        num_samples=10,
        index_split="train",
        split="1",
        random_seed=3,
        sequence_length=4,
    )
    path = (
        tmp_path / "cache" / f"{hashlib.md5(text.encode()).hexdigest()}-GPTDataset-description.txt"
    )
    assert path.read_text() == text
    assert list(json.loads(text)) == [
        "class", "path_prefix", "num_samples", "index_split", "name", "split", "random_seed",
        "sequence_length",
    ]  # fmt: skip


def test_index_of_a_rewritten_corpus_is_built_again(open_cached):
    open_cached([9, 8, 7])
    rows = open_cached([9, 8, 7, 30]).fetch(np.arange(10)).tokens
    assert rows.max() > 24


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY\x01\x00", b"junk" * 10])
def test_damaged_cache_is_built_again(open_cached, tmp_path, content, caplog):
    places = np.arange(10)
    built = open_cached([9, 8, 7]).fetch(places).tokens
    next((tmp_path / "cache").glob("*sample_index.npy")).write_bytes(content)
    assert (open_cached([9, 8, 7]).fetch(places).tokens == built).all()
    assert "unreadable" in caplog.text


def test_cache_that_would_need_unpickling_is_refused(open_cached, tmp_path, caplog):
    open_cached([9, 8, 7])
    path = next((tmp_path / "cache").glob("*document_index.npy"))
    np.save(path, np.array([{"a": 1}], object), allow_pickle=True)
    open_cached([9, 8, 7]).fetch(np.arange(10))
    assert "unreadable" in caplog.text
