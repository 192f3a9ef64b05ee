"""Verification: damage anywhere is found."""

import json
import random

import google_crc32c
import pytest

from lme_data import manifest as module
from lme_data.indexed import CorruptDataError, bin_path, idx_path
from lme_data.manifest import TokenizerInfo, manifest_path, read_manifest, sums_of, verify


def test_sound_pair_has_no_faults(write_corpus):
    prefix = write_corpus([30, 50, 20])
    report = verify(prefix)
    assert report.is_sound
    assert report.has_manifest
    assert (report.num_tokens, report.num_documents) == (100, 3)
    assert report.bytes_checked == 200 + idx_path(prefix).stat().st_size


def test_checksums_are_crc32c_of_chunks(write_corpus, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_BYTES", 64)
    prefix = write_corpus([30, 50, 20])
    content = bin_path(prefix).read_bytes()
    expected = [google_crc32c.value(content[i : i + 64]) for i in range(0, len(content), 64)]
    assert sums_of(bin_path(prefix)).crc32c == expected
    assert len(expected) == 4
    # The published check value of CRC-32C.
    assert google_crc32c.value(b"123456789") == 0xE3069283


@pytest.mark.parametrize("seed", range(40))
def test_any_flip_or_cut_or_growth_is_found(write_corpus, seed):
    prefix = write_corpus([30, 0, 50, 20, 7])
    draw = random.Random(seed)
    path = draw.choice([bin_path, idx_path])(prefix)
    content = bytearray(path.read_bytes())
    kind = ("flip", "cut", "grow", "swap")[seed % 4]
    if kind == "flip":
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    elif kind == "cut":
        del content[draw.randrange(len(content)) :]
    elif kind == "grow":
        content += bytes(draw.randrange(256) for _ in range(draw.randrange(1, 9)))
    else:
        first, second = draw.randrange(len(content)), draw.randrange(len(content))
        if content[first] == content[second]:
            content[first] ^= 0xFF
        content[first], content[second] = content[second], content[first]
    path.write_bytes(bytes(content))
    report = verify(prefix)
    assert not report.is_sound
    assert any(str(path) in fault for fault in report.faults)


@pytest.mark.parametrize("path", [bin_path, idx_path])
def test_missing_file_is_a_fault(write_corpus, path):
    prefix = write_corpus([3])
    path(prefix).unlink()
    assert "does not exist" in verify(prefix).faults[0]


def test_pair_without_manifest_is_checked_for_structure_only(write_corpus):
    prefix = write_corpus([3])
    manifest_path(prefix).unlink()
    report = verify(prefix)
    assert (report.is_sound, report.has_manifest, report.bytes_checked) == (True, False, 0)


@pytest.mark.parametrize("key", ["num_tokens", "num_documents", "smallest_id", "largest_id"])
def test_manifest_that_contradicts_the_content_is_a_fault(write_corpus, key):
    prefix = write_corpus([3, 4])
    content = json.loads(manifest_path(prefix).read_text())
    content[key] += 1
    manifest_path(prefix).write_text(json.dumps(content))
    assert f"manifest says {content[key]}" in verify(prefix).faults[0]


def test_tokenizer_is_kept(write_corpus):
    info = TokenizerInfo(name="t", sha256="00", vocab_size=9, eos_token_id=3)
    prefix = write_corpus([3], tokenizer=info)
    manifest = read_manifest(prefix)
    assert manifest is not None
    assert manifest.tokenizer == info


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not a manifest"),
        ("{}", "not a manifest"),
        ('{"format_version": 1}', "not a manifest"),
        ('{"format_version": 7}', "manifest version 7"),
    ],
)
def test_file_that_is_no_manifest_is_a_fault(write_corpus, content, message):
    prefix = write_corpus([3])
    manifest_path(prefix).write_text(content)
    with pytest.raises(CorruptDataError, match=message):
        read_manifest(prefix)
    assert message in verify(prefix).faults[0]
