"""The zarr store against the pair it was made from."""

import numpy as np
import pytest

from lme_data import token_store
from lme_data.indexed import CorruptDataError, IndexedTokens, bin_path, idx_path
from lme_data.manifest import TokenizerInfo, read_manifest
from lme_data.token_store import TokenStore, store_to_pair, write_token_store

pytest.importorskip("tensorstore")

LENGTHS = [30, 0, 50, 20, 7, 200, 3]


@pytest.fixture
def pair(write_corpus, monkeypatch):
    monkeypatch.setattr(token_store, "CHUNK_TOKENS", 16)
    monkeypatch.setattr(token_store, "SHARD_TOKENS", 64)
    info = TokenizerInfo(name="t", sha256="aa", vocab_size=400, eos_token_id=0)
    return write_corpus(LENGTHS, tokenizer=info)


def test_store_holds_the_documents_of_the_pair(pair, tmp_path):
    write_token_store(pair, tmp_path / "store")
    store, tokens = TokenStore(tmp_path / "store"), IndexedTokens(pair)
    assert store.manifest == read_manifest(pair)
    assert (store.num_documents, store.num_tokens) == (7, 310)
    for number in range(7):
        assert store.document(number).tolist() == tokens.sequence(number).tolist()
    assert store.read(25, 90).tolist() == list(range(25, 90))
    assert store.verify() == []


def test_store_and_pair_convert_without_loss(pair, tmp_path):
    write_token_store(pair, tmp_path / "store")
    store_to_pair(tmp_path / "store", tmp_path / "back")
    for path in (bin_path, idx_path):
        assert path(tmp_path / "back").read_bytes() == path(pair).read_bytes()


def test_other_readers_open_the_arrays(pair, tmp_path):
    zarr = pytest.importorskip("zarr")
    write_token_store(pair, tmp_path / "store")
    group = zarr.open_group(tmp_path / "store", mode="r")
    assert np.asarray(group["tokens"]).tolist() == list(range(310))
    assert np.asarray(group["document_offsets"]).tolist() == [0, *np.cumsum(LENGTHS).tolist()]
    assert group.attrs["lme_data"]["num_documents"] == 7


def test_damaged_or_unfinished_stores_are_refused(pair, tmp_path):
    with pytest.raises(CorruptDataError, match="no finished token store"):
        TokenStore(tmp_path / "nothing")
    write_token_store(pair, tmp_path / "store")
    with pytest.raises(ValueError, match="holds a token store already"):
        write_token_store(pair, tmp_path / "store")
    shard = max((tmp_path / "store" / "tokens" / "c").iterdir())
    content = bytearray(shard.read_bytes())
    content[3] ^= 0xFF
    shard.write_bytes(bytes(content))
    assert len(TokenStore(tmp_path / "store").verify()) == 1
    shard.unlink()
    assert len(TokenStore(tmp_path / "store").verify()) == 1
    (tmp_path / "store" / "zarr.json").write_text("{}")
    with pytest.raises(CorruptDataError, match="not a token store"):
        TokenStore(tmp_path / "store")
