"""Writing: atomic, resumable, merging, and what is refused."""

import numpy as np
import pytest

from lme_data.indexed import IndexedTokens, bin_path, idx_path
from lme_data.manifest import read_manifest, verify, write_manifest
from lme_data.writer import IndexedWriter


def test_nothing_is_visible_before_finalize(tmp_path):
    prefix = tmp_path / "pair"
    with IndexedWriter(prefix, np.dtype("<u2")) as writer:
        writer.add_document(np.arange(5))
        assert not bin_path(prefix).exists()
        assert not idx_path(prefix).exists()
        writer.finalize()
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["pair.bin", "pair.idx", "pair.manifest.json"]


def test_resumed_writer_gives_the_same_bytes(tmp_path):
    parts = [np.arange(5), np.arange(7) * 3, np.arange(2), np.arange(11)]
    with IndexedWriter(tmp_path / "whole", np.dtype("<u2")) as writer:
        for part in parts:
            writer.add_document(part)
        whole = writer.finalize()
    with IndexedWriter(tmp_path / "cut", np.dtype("<u2")) as writer:
        writer.add_document(parts[0])
        writer.add_document(parts[1])
        position = writer.position()
        # Written after the position was taken: to be dropped.
        writer.add_document(np.full(9, 60_000))
    assert IndexedWriter.has_unfinished_files(tmp_path / "cut")
    with IndexedWriter(tmp_path / "cut", np.dtype("<u2"), resume_from=position) as writer:
        for part in parts[2:]:
            writer.add_document(part)
        cut = writer.finalize()
    assert cut == whole
    for path in (bin_path, idx_path):
        assert path(tmp_path / "cut").read_bytes() == path(tmp_path / "whole").read_bytes()


def test_unfinished_files_shorter_than_the_position_are_refused(tmp_path):
    with IndexedWriter(tmp_path / "cut", np.dtype("<u2")) as writer:
        writer.add_document(np.arange(9))
        position = writer.position()
    (tmp_path / "cut.bin.partial").write_bytes(b"12")
    with pytest.raises(ValueError, match="shorter than"):
        IndexedWriter(tmp_path / "cut", np.dtype("<u2"), resume_from=position)


@pytest.mark.parametrize("wrong", [-1, 65_536])
def test_id_that_does_not_fit_is_refused(tmp_path, wrong):
    with (
        IndexedWriter(tmp_path / "pair", np.dtype("<u2")) as writer,
        pytest.raises(ValueError, match="do not fit uint16"),
    ):
        writer.add_document(np.array([1, wrong]))


def test_pairs_are_appended_with_their_documents(write_corpus, tmp_path):
    one, two = write_corpus([3, 4], "one"), write_corpus([5], "two", first=100)
    with IndexedWriter(tmp_path / "both", np.dtype("<u2")) as writer:
        writer.add_pair(one)
        writer.add_pair(two)
        manifest = writer.finalize()
    both = IndexedTokens(tmp_path / "both")
    assert both.lengths.tolist() == [3, 4, 5]
    assert both.document_bounds.tolist() == [0, 1, 2, 3]
    assert both.tokens.tolist() == [*range(7), *range(100, 105)]
    assert (manifest.smallest_id, manifest.largest_id) == (0, 104)
    assert verify(tmp_path / "both").is_sound


def test_pair_of_another_dtype_is_refused(write_corpus, tmp_path):
    with (
        IndexedWriter(tmp_path / "both", np.dtype("<i4")) as writer,
        pytest.raises(ValueError, match="one dtype"),
    ):
        writer.add_pair(write_corpus([3]))


def test_written_manifest_is_what_reading_the_pair_gives(write_corpus):
    prefix = write_corpus([3, 4, 5], first=7)
    assert read_manifest(prefix) == write_manifest(prefix)
