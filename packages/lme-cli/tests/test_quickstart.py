"""The embedded default, cut to a few steps: its data, its run, and every command after it."""

import json
import re
import shutil

import numpy as np
import pytest
import torch

from lme_cli import quickstart
from lme_cli.errors import CommandError
from lme_data.indexed import IndexedTokens
from lme_data.manifest import verify
from lme_data.tokenizer import load_tokenizer

SHORT = (
    "training_parameters.num_training_steps=4",
    "training_parameters.eval_interval=2",
    "datasets.0.class_args.eval_steps=1",
    "logging_args.log_interval=1",
    "model_args.pretrained_config.hidden_size=64",
    "model_args.pretrained_config.mlp_blocks.0.intermediate_size=128",
)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """A small standard library, large enough to be accepted."""
    folder = tmp_path_factory.mktemp("lib")
    words = np.random.default_rng(0).integers(0, 500, (60, 1_500))
    for number, row in enumerate(words):
        text = "\n".join(f"def name_{a}(x{b}): return x{b} + {a}" for a, b in row.reshape(-1, 2))
        (folder / f"module_{number}.py").write_text(text[: 20_000 if number % 2 else 10_000])
    (folder / "test").mkdir()
    (folder / "test" / "test_left_out.py").write_text("secret = 'left out'\n" * 100)
    (folder / "site-packages").mkdir()
    (folder / "site-packages" / "other.py").write_text("secret = 'left out'\n" * 100)
    (folder / "empty.py").write_text("\n")
    (folder / "latin.py").write_bytes(b"# \xff\n")
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory, library):
    """A finished short run of the embedded default: its directory and what it printed."""
    import contextlib
    import io
    import sys

    from lme_cli import app

    run = tmp_path_factory.mktemp("quick") / "run"
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr(quickstart.sysconfig, "get_paths", lambda: {"stdlib": str(library)})
    monkeypatch.setattr(quickstart, "MINIMUM_BYTES", 500_000)
    sets = [
        each for setting in (f"save_args.save_path={run}", *SHORT) for each in ("--set", setting)
    ]
    monkeypatch.setattr(sys, "argv", ["lme", "train", *sets])
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        app.main()
    monkeypatch.undo()
    return run, out.getvalue()


def test_this_machine_has_the_text_that_the_default_needs():
    files = quickstart.collect()
    size = sum(len(each.text.encode()) for each in files)
    assert size > 5_000_000
    assert not any("/test/" in f"/{each.name}" or "site-packages" in each.name for each in files)
    held_out = [each for each in files if each.is_held_out]
    share = sum(len(each.text) for each in held_out) / sum(len(each.text) for each in files)
    assert 0.02 < share < 0.1
    assert max(len(each.text) for each in held_out) <= quickstart.LARGEST_HELD_OUT_BYTES


def test_a_library_in_an_archive_is_refused_with_a_remedy(tmp_path):
    with pytest.raises(CommandError, match="give `lme train` a run file"):
        quickstart.collect(tmp_path)


def test_the_data_are_whole_documents_and_validation_files_are_never_trained_on(finished, library):
    run, _ = finished
    listing = json.loads((run / "data" / "corpus.json").read_text())
    tokenizer = load_tokenizer(run / "data" / "tokenizer")
    assert tokenizer.vocab_size <= 4096
    for split in ("train", "val"):
        prefix = run / "data" / split
        assert verify(prefix).is_sound
        pair = IndexedTokens(prefix)
        names = [each["name"] for each in listing["files"] if each["split"] == split]
        assert pair.num_documents == len(names)
        ids = pair.sequence(0).tolist()
        assert ids[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(ids[:-1]) == (library / names[0]).read_text()
    names = {each["name"] for each in listing["files"]}
    assert len(names) == len(listing["files"]) == 60


def test_it_trains_evaluates_saves_reports_and_completes(finished):
    run, out = finished
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    validation = [row for row in rows if row["context"] == "val"]
    assert [row["step"] for row in validation] == [2, 4]
    # Before training every token is as likely as any other: ln 4096 = 8.32, and a little more.
    assert 8.0 < rows[0]["loss"] < 9.0
    assert validation[-1]["loss"] < validation[0]["loss"]
    assert validation[-1]["bits_per_byte"] > 0
    assert out.count("--- completion") == 3
    page = (run / "report.html").read_text()
    assert page.count('class="sample"') == 3
    assert {path.name for path in run.iterdir()} >= {"global_step4", "run.yml", "data"}


def test_bits_per_byte_count_the_bytes_of_the_targets(finished):
    from lme_cli.run_tokenizer import bytes_per_target

    tokenizer = load_tokenizer(finished[0] / "data" / "tokenizer")
    text = "def größe(x): return x\n" * 3
    ids = [*tokenizer.encode(text), tokenizer.eos_token_id]
    labels = torch.tensor([[*ids, -100, -100]])
    size = bytes_per_target([{"labels": labels}], tokenizer)
    assert size == pytest.approx(len(text.encode()) / len(ids))


def test_moving_the_save_path_moves_everything(tmp_path):
    read = quickstart.load_default([f"save_args.save_path={tmp_path}"])
    assert "lme-quickstart" not in json.dumps(read.values)
    (dataset,) = read.values["datasets"]
    assert dataset["class_args"]["train_data_path"] == [f"{tmp_path}/data/train"]
    assert read.values["tokenizer_args"]["tokenizer_name"] == f"{tmp_path}/data/tokenizer"
    # A file that was written down leads to the data again.
    assert str(tmp_path) in read.text
    assert "lme-quickstart" not in read.text


def test_the_size_is_what_the_default_promises():
    from lme_cli import flops
    from lme_cli.loading import check_run

    loaded = check_run(quickstart.load_default())
    config = loaded.run.model_args.pretrained_config
    assert config is not None
    _, inner = flops.count(config)
    assert 2e6 < inner < 4e6
    assert config.normalization_function == "rmsnorm"
    assert config.position_embedding_type == "rope"
    assert list(loaded.warnings) == []


def test_it_can_be_run_again_and_for_longer_from_its_own_run_file(finished, lme):
    run, _ = finished
    data = (run / "data" / "train.bin").stat().st_mtime_ns
    code, out, err = lme(
        "train", run / "run.yml", "--set", "training_parameters.num_training_steps=5"
    )
    assert code == 0, err
    assert "starts from  step 4," in out
    assert (run / "global_step5").exists()
    assert (run / "data" / "train.bin").stat().st_mtime_ns == data


def test_text_can_be_generated_from_a_run_a_checkpoint_and_a_model_directory(
    finished, lme, tmp_path
):
    run, _ = finished
    options = ("--prompt", "def name_", "--max-new-tokens", "12", "--seed", "3")
    code, first, err = lme("generate", run, *options)
    assert code == 0, err
    assert first.startswith("def name_")
    assert lme("generate", run, *options)[1] == first
    assert lme("generate", run, *options[:-1], "4")[1] != first
    newest = sorted(run.glob("global_step*"))[-1]
    assert lme("generate", newest, *options)[1] == first
    code, _, err = lme("unshard", run, tmp_path / "model")
    assert code == 0, err
    assert lme("generate", tmp_path / "model", *options)[1] == first
    greedy = [
        lme("generate", run, *options[:4], "--temperature", "0", "--seed", seed)[1]
        for seed in ("1", "2")
    ]
    assert greedy[0] == greedy[1]


def test_unshard_takes_a_run_file_and_a_dtype(finished, lme, tmp_path):
    from lme_convert.directory import ModelDirectory
    from lme_parallel.checkpoint.unshard import iterate_tensors, open_checkpoint

    run, _ = finished
    file = tmp_path / "unshard.yml"
    file.write_text(
        f"load_args: {{load_path: {run}, iteration: 4}}\nunsharded_path: {tmp_path / 'model'}\n"
        "mixed_precision_args: {dtype: bf16}\n"
    )
    code, out, err = lme("unshard", "--config", file)
    assert code == 0, err
    assert "step 4" in out
    directory = ModelDirectory(tmp_path / "model")
    for name, tensor in iterate_tensors(open_checkpoint(run, 4)):
        assert torch.equal(directory.tensor(name), tensor.bfloat16())
    assert (tmp_path / "model" / "tokenizer.json").exists()


def test_a_model_goes_to_huggingface_and_back_unchanged(finished, lme, tmp_path):
    pytest.importorskip("transformers")
    from lme_convert.directory import ModelDirectory

    run, _ = finished
    assert lme("unshard", run, tmp_path / "model")[0] == 0
    code, out, err = lme("convert", "export", tmp_path / "model", tmp_path / "hf")
    assert code == 0, err
    assert re.search(r"hf: certified$", out, re.M)
    code, out, err = lme("convert", "import", tmp_path / "hf", tmp_path / "again", "--uncertified")
    assert code == 0, err
    first, again = ModelDirectory(tmp_path / "model"), ModelDirectory(tmp_path / "again")
    assert first.names == again.names
    assert all(torch.equal(first.tensor(name), again.tensor(name)) for name in first.names)
    assert first.config["vocab_size"] == again.config["vocab_size"]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("generate", "{run}/data"), "neither a model directory"),
        (("unshard", "{run}/data", "out"), "holds no committed checkpoint"),
        (("unshard", "{run}"), "give CHECKPOINT and OUT"),
        (("evaluate", "{run}", "--split", "all"), "`--split` must be"),
        (("generate", "{run}", "--tokenizer", "absent.json"), "`tokenizer_name`"),
    ],
)
def test_wrong_arguments_are_one_clear_error(finished, lme, tmp_path, monkeypatch, arguments, word):
    monkeypatch.chdir(tmp_path)
    code, _, err = lme(*[each.format(run=finished[0]) for each in arguments])
    assert code == 1
    assert word in err
    assert "Traceback" not in err


def test_token_files_can_be_inspected_verified_merged_and_previewed(finished, lme, tmp_path):
    run, _ = finished
    val = run / "data" / "val"
    code, out, _ = lme("data", "inspect", val)
    assert code == 0
    assert re.search(r"^tokenizer +tokenizer, [\d,]+ ids, sha256 [0-9a-f]{64}$", out, re.M)
    assert "sound" in lme("data", "verify", val)[1]
    assert lme("data", "merge", val, val, "--output-prefix", tmp_path / "twice")[0] == 0
    assert IndexedTokens(tmp_path / "twice").num_tokens == 2 * IndexedTokens(val).num_tokens
    tokenizer = run / "data" / "tokenizer"
    out = lme("data", "preview", val, "--tokenizer", tokenizer, "--count", "1")[1]
    assert out.startswith("--- document 0 ---\ndef name_")
    out = lme("data", "preview", run / "run.yml", "--count", "1")[1]
    assert out.startswith("--- row 1: 256 tokens, 256 targets ---")
    shutil.copy(f"{val}.bin", tmp_path / "bad.bin")
    for ending in (".idx", ".manifest.json"):
        shutil.copy(f"{val}{ending}", tmp_path / f"bad{ending}")
    with (tmp_path / "bad.bin").open("r+b") as file:
        file.seek(100)
        file.write(b"\xff")
    code, out, _ = lme("data", "verify", tmp_path / "bad")
    assert code == 1
    assert out.startswith("fault: ")


def test_text_is_tokenised_by_the_command(finished, lme, tmp_path):
    run, _ = finished
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("def name_1(x2): return x2 + 1\n")
    (tmp_path / "text" / "b.jsonl").write_text(
        '{"text": "def name_3(x4)"}\n{"other": 1}\nno json\n'
    )
    code, out, err = lme(
        "data", "tokenize", tmp_path / "text", "--tokenizer", run / "data" / "tokenizer",
        "--output-prefix", tmp_path / "out",
    )  # fmt: skip
    assert code == 0, err
    assert "left out: 1 lines were no JSON objects" in out
    assert "left out: 1 documents lacked a key" in out
    tokenizer = load_tokenizer(run / "data" / "tokenizer")
    pair = IndexedTokens(tmp_path / "out")
    texts = [tokenizer.decode(pair.sequence(i).tolist()[:-1]) for i in range(pair.num_documents)]
    assert texts == ["def name_1(x2): return x2 + 1\n", "def name_3(x4)"]
