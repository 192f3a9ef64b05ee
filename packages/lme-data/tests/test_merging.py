"""Merging, counting, describing and showing pairs."""

import pytest

from lme_data.indexed import IndexedTokens
from lme_data.manifest import TokenizerInfo, manifest_path, read_manifest, verify
from lme_data.merging import count_tokens, inspect_corpus, merge_corpora, preview

INFO = TokenizerInfo(name="t", sha256="aa", vocab_size=300, eos_token_id=0)
OTHER = TokenizerInfo(name="u", sha256="bb", vocab_size=300, eos_token_id=0)


def test_merged_pair_holds_the_documents_in_order(write_corpus, tmp_path):
    parts = [write_corpus([3, 4], "a", tokenizer=INFO), write_corpus([2], "b", tokenizer=INFO)]
    seen = []
    merge_corpora(parts, tmp_path / "out", on_pair=seen.append)
    pair = IndexedTokens(tmp_path / "out")
    assert [pair.sequence(n).tolist() for n in range(3)] == [[0, 1, 2], [3, 4, 5, 6], [0, 1]]
    assert seen == parts
    assert verify(tmp_path / "out").is_sound
    manifest = read_manifest(tmp_path / "out")
    assert manifest is not None
    assert manifest.tokenizer == INFO


def test_pairs_of_different_tokenizers_are_refused(write_corpus, tmp_path):
    parts = [write_corpus([3], "a", tokenizer=INFO), write_corpus([2], "b", tokenizer=OTHER)]
    with pytest.raises(ValueError, match="different tokenizers"):
        merge_corpora(parts, tmp_path / "out")


def test_output_over_an_input_is_refused(write_corpus):
    prefix = write_corpus([3])
    with pytest.raises(ValueError, match="is one of the pairs"):
        merge_corpora([prefix], prefix)
    with pytest.raises(ValueError, match="`prefixes` is empty"):
        merge_corpora([], prefix)


def test_summary_counts(write_corpus):
    prefix = write_corpus([4, 0, 8], tokenizer=INFO)
    summary = inspect_corpus(prefix)
    assert (summary.num_documents, summary.num_tokens, summary.bin_bytes) == (3, 12, 24)
    assert (summary.shortest, summary.median, summary.mean, summary.longest) == (0, 4, 4, 8)
    assert (summary.num_empty, summary.smallest_id, summary.largest_id) == (1, 0, 11)
    assert summary.tokenizer == INFO
    manifest_path(prefix).unlink()
    bare = inspect_corpus(prefix)
    assert (bare.has_manifest, bare.tokenizer, bare.largest_id) == (False, None, 11)
    assert count_tokens([prefix]) == {prefix: 12}


def test_preview_shows_ids_or_text(write_corpus, tokenizer):
    prefix = write_corpus([4, 3], first=100)
    assert preview(prefix, None, documents=[0, 1]) == ["100 101 102 103", "104 105 106"]
    assert preview(prefix, None, max_tokens=2) == ["100 101"]
    assert preview(prefix, tokenizer) == [tokenizer.decode([100, 101, 102, 103])]
    with pytest.raises(ValueError, match="0 to 1, got 2"):
        preview(prefix, None, documents=[2])
