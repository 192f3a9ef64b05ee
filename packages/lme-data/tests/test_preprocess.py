"""Tokenising text: what is written, and the same bytes after being killed."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from lme_data import preprocess
from lme_data.indexed import IndexedTokens, bin_path, idx_path
from lme_data.manifest import manifest_path, read_manifest, verify
from lme_data.preprocess import tokenize_files

TEXTS = [f"document {number}: " + "to be or not to be. " * (number % 7) for number in range(60)]


@pytest.fixture
def jsonl(tmp_path):
    path = tmp_path / "in" / "a.jsonl"
    path.parent.mkdir()
    path.write_text("".join(json.dumps({"text": text, "title": text[:9]}) + "\n" for text in TEXTS))
    return path


def documents(prefix):
    pair = IndexedTokens(prefix)
    return [pair.sequence(number).tolist() for number in range(len(pair))]


def test_every_line_is_a_document_in_order(jsonl, tokenizer, tmp_path):
    report = tokenize_files([jsonl], tmp_path / "out", tokenizer, append_eod=True)
    expected = [[*tokenizer.encode(text), tokenizer.eos_token_id] for text in TEXTS]
    assert documents(tmp_path / "out") == expected
    assert report.num_tokens == sum(map(len, expected))
    assert report.num_documents == len(TEXTS)
    assert verify(tmp_path / "out").is_sound
    manifest = read_manifest(tmp_path / "out")
    assert manifest is not None
    assert manifest.tokenizer is not None
    assert manifest.tokenizer.sha256 == tokenizer.fingerprint()
    assert manifest.tokenizer.eos_token_id == tokenizer.eos_token_id


@pytest.mark.parametrize("kind", ["gz", "zst", "parquet", "json"])
def test_other_forms_give_the_same_bytes(jsonl, tokenizer, tmp_path, kind):
    tokenize_files([jsonl], tmp_path / "plain", tokenizer)
    if kind == "gz":
        path = tmp_path / "a.jsonl.gz"
        path.write_bytes(gzip.compress(jsonl.read_bytes()))
    elif kind == "zst":
        pyarrow = pytest.importorskip("pyarrow")
        path = tmp_path / "a.jsonl.zst"
        with pyarrow.output_stream(str(path), compression="zstd") as file:
            file.write(jsonl.read_bytes())
    elif kind == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        path = tmp_path / "a.parquet"
        parquet.write_table(pyarrow.table({"text": TEXTS}), path, row_group_size=7)
    else:
        path = tmp_path / "a.json"
        path.write_bytes(jsonl.read_bytes())
    tokenize_files([path], tmp_path / "other", tokenizer)
    for ending in (bin_path, idx_path):
        assert ending(tmp_path / "other").read_bytes() == ending(tmp_path / "plain").read_bytes()


def test_folder_of_texts_is_read_sorted_without_hidden_files(tokenizer, tmp_path):
    folder = tmp_path / "in"
    (folder / "b").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    (folder / "b" / "z.py").write_text("last")
    (folder / "a.txt").write_text("first")
    (folder / "b" / "a.md").write_bytes(b"mid\xffdle")
    (folder / ".x.txt").write_text("no")
    (folder / ".hidden" / "y.txt").write_text("no")
    (folder / "empty.txt").write_text("")
    tokenize_files([folder], tmp_path / "out", tokenizer)
    found = [tokenizer.decode(ids) for ids in documents(tmp_path / "out")]
    assert found == ["first", "mid\ufffddle", "last"]


@pytest.mark.parametrize(
    ("kind", "expected"), [("line", ["a", "b", "c", "d"]), ("paragraph", ["a\nb", "c\nd"])]
)
def test_text_can_be_cut_into_lines_or_paragraphs(tokenizer, tmp_path, kind, expected):
    (tmp_path / "t.txt").write_text("a\nb\n\nc\nd")
    tokenize_files([tmp_path / "t.txt"], tmp_path / "out", tokenizer, documents=kind)
    assert [tokenizer.decode(ids) for ids in documents(tmp_path / "out")] == expected


def test_each_key_gets_its_own_pair(jsonl, tokenizer, tmp_path):
    report = tokenize_files([jsonl], tmp_path / "out", tokenizer, json_keys=["text", "title"])
    assert report.prefixes == {
        "text": f"{tmp_path / 'out'}_text",
        "title": f"{tmp_path / 'out'}_title",
    }
    assert documents(report.prefixes["title"]) == [tokenizer.encode(text[:9]) for text in TEXTS]


def test_bad_lines_and_missing_keys_are_counted_and_left_out(tokenizer, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b'{"text": "one"}\nnot json\n{"other": 1}\n[1]\n{"text": ""}\n{"text": 5}\n\n{"text": "two"}'
    )
    report = tokenize_files([path], tmp_path / "out", tokenizer)
    assert [tokenizer.decode(ids) for ids in documents(tmp_path / "out")] == ["one", "two"]
    assert (report.num_unreadable, report.num_missing, report.num_empty) == (1, 3, 1)


def test_small_batches_and_documents_larger_than_a_batch_change_nothing(
    jsonl, tokenizer, tmp_path, monkeypatch
):
    tokenize_files([jsonl], tmp_path / "whole", tokenizer)
    monkeypatch.setattr("lme_data.text_inputs.BATCH_BYTES", 37)
    progress = []
    tokenize_files([jsonl], tmp_path / "small", tokenizer, on_progress=progress.append)
    assert bin_path(tmp_path / "small").read_bytes() == bin_path(tmp_path / "whole").read_bytes()
    assert len(progress) > 50
    assert progress[-1].bytes_done == progress[-1].bytes_total == jsonl.stat().st_size


@pytest.mark.parametrize("form", ["jsonl", "gz", "parquet", "texts"])
def test_job_stopped_anywhere_goes_on_to_the_same_bytes(
    jsonl, tokenizer, tmp_path, monkeypatch, form
):
    folder = jsonl.parent
    if form == "gz":
        (folder / "b.jsonl.gz").write_bytes(gzip.compress(jsonl.read_bytes()))
    elif form == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.table({"text": TEXTS}), folder / "b.parquet", row_group_size=7)
    elif form == "texts":
        for number, text in enumerate(TEXTS):
            (folder / f"b{number:02}.txt").write_text(text)
    monkeypatch.setattr("lme_data.text_inputs.BATCH_BYTES", 300)
    monkeypatch.setattr(preprocess, "_SECONDS_BETWEEN_STATES", -1.0)
    tokenize_files([folder], tmp_path / "whole", tokenizer)

    class StoppedError(Exception):
        pass

    stops = 0
    while True:
        calls = 0

        def stop(progress):
            nonlocal calls
            calls += 1
            if calls == 4:
                raise StoppedError

        try:
            report = tokenize_files([folder], tmp_path / "cut", tokenizer, on_progress=stop)
            break
        except StoppedError:
            stops += 1
    assert stops >= 3
    assert report.was_resumed
    for path in (bin_path, idx_path, manifest_path):
        assert path(tmp_path / "cut").read_bytes() == path(tmp_path / "whole").read_bytes()
    assert not list(tmp_path.glob("*.partial"))
    assert not list(tmp_path.glob("*.tokenize.json"))


def test_job_of_other_settings_starts_anew(jsonl, tokenizer, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("lme_data.text_inputs.BATCH_BYTES", 300)
    monkeypatch.setattr(preprocess, "_SECONDS_BETWEEN_STATES", -1.0)

    def stop(progress):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tokenize_files([jsonl], tmp_path / "out", tokenizer, on_progress=stop)
    report = tokenize_files([jsonl], tmp_path / "out", tokenizer, append_eod=True)
    assert not report.was_resumed
    assert "other inputs or settings" in caplog.text
    assert report.num_documents == len(TEXTS)


@pytest.mark.parametrize("stage", ["first pair", "second pair"])
def test_job_stopped_while_finishing_goes_on(jsonl, tokenizer, tmp_path, monkeypatch, stage):
    keys = ["text", "title"]
    expected = tokenize_files([jsonl], tmp_path / "whole", tokenizer, json_keys=keys)
    real = preprocess.IndexedWriter.finalize
    calls = 0

    def finalize(self, info=None):
        nonlocal calls
        calls += 1
        if calls == (1 if stage == "first pair" else 2):
            raise KeyboardInterrupt
        return real(self, info)

    monkeypatch.setattr(preprocess.IndexedWriter, "finalize", finalize)
    with pytest.raises(KeyboardInterrupt):
        tokenize_files([jsonl], tmp_path / "cut", tokenizer, json_keys=keys)
    monkeypatch.setattr(preprocess.IndexedWriter, "finalize", real)
    report = tokenize_files([jsonl], tmp_path / "cut", tokenizer, json_keys=keys)
    assert report.manifests == expected.manifests
    assert report.was_resumed


def test_killed_process_leaves_a_job_that_goes_on(jsonl, tokenizer, tmp_path):
    """SIGKILL at several moments, then one run to the end, with processes."""
    big = tmp_path / "big.jsonl"
    big.write_bytes(jsonl.read_bytes() * 200)
    tokenizer.save(tmp_path / "tok")
    script = tmp_path / "job.py"
    script.write_text(
        "import sys\n"
        "from lme_data import preprocess, text_inputs\n"
        "from lme_data.tokenizer import load_tokenizer\n"
        "if __name__ == '__main__':\n"
        "    preprocess._SECONDS_BETWEEN_STATES = 0.0\n"
        "    text_inputs.BATCH_BYTES = 50_000\n"
        "    preprocess.tokenize_files([sys.argv[1]], sys.argv[2], load_tokenizer(sys.argv[3]),\n"
        "        num_processes=1, on_progress=lambda p: print(p.bytes_done, flush=True))\n"
    )
    command = [sys.executable, str(script), str(big), str(tmp_path / "cut"), str(tmp_path / "tok")]
    state = tmp_path / "cut.tokenize.json"
    for batches in (2, 3):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        for _ in range(batches):
            process.stdout.readline()
        deadline = time.monotonic() + 30
        while not state.exists() and time.monotonic() < deadline:
            process.stdout.readline()
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
    assert state.exists()
    subprocess.run(command, check=True, capture_output=True)
    whole = tokenize_files([big], tmp_path / "whole", tokenizer)
    assert whole.num_documents == 12_000
    for path in (bin_path, idx_path):
        assert path(tmp_path / "cut").read_bytes() == path(tmp_path / "whole").read_bytes()


def test_processes_change_nothing_and_their_failures_are_told(jsonl, tokenizer, tmp_path):
    tokenize_files([jsonl], tmp_path / "one", tokenizer)
    tokenize_files([jsonl], tmp_path / "two", tokenizer, num_processes=2)
    for path in (bin_path, idx_path, manifest_path):
        assert path(tmp_path / "two").read_bytes() == path(tmp_path / "one").read_bytes()


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "no document"), ('{"other": "x"}\n', "1 without the key"), ("junk\n", "1 unreadable")],
)
def test_input_without_documents_is_an_error(tokenizer, tmp_path, content, message):
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        tokenize_files([path], tmp_path / "out", tokenizer)


def test_wrong_arguments_are_refused(jsonl, tokenizer, tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        tokenize_files([tmp_path / "nothing"], tmp_path / "out", tokenizer)
    with pytest.raises(ValueError, match="`json_keys`"):
        tokenize_files([jsonl], tmp_path / "out", tokenizer, json_keys=["a", "a"])
    with pytest.raises(ValueError, match="`num_processes`"):
        tokenize_files([jsonl], tmp_path / "out", tokenizer, num_processes=-1)


def test_vocabulary_decides_the_dtype(jsonl, tokenizer, tmp_path):
    tokenize_files([jsonl], tmp_path / "out", tokenizer)
    assert IndexedTokens(tmp_path / "out").dtype == np.dtype("<u2")
    assert Path(f"{tmp_path / 'out'}.bin").stat().st_size % 2 == 0
