"""Every YAML block and every command in the documents is one that works."""

import os
import re
import runpy
import shlex
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from lme_cli.app import app
from lme_parallel.testing import run_distributed

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", *ROOT.glob("packages/*/README.md"), *ROOT.glob("docs/**/*.md")]
RUN_FILES = sorted(ROOT.glob("configs/**/*.yml"))


def blocks(language):
    for document in DOCUMENTS:
        pattern = rf"^```{language}\n(.*?)^```"
        for number, match in enumerate(re.finditer(pattern, document.read_text(), re.M | re.S)):
            yield pytest.param(match[1], id=f"{document.relative_to(ROOT)}-{number}")


@pytest.fixture
def lme(tmp_path, monkeypatch, capsys):
    """Run `lme` in a folder, in this process: a new one for each command would import torch."""
    from lme_cli.app import main

    monkeypatch.chdir(tmp_path)

    def run(*words):
        monkeypatch.setattr("sys.argv", ["lme", *words])
        code = 0
        try:
            main()
        except SystemExit as error:
            code = error.code or 0
        shown = capsys.readouterr()
        assert code == 0, f"lme {shlex.join(words)}\n{shown.out}{shown.err}"

    return run


def check_run_file(file, *options):
    """In this process, as above."""
    result = CliRunner().invoke(app, ["config", "check", str(file), *options])
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("text", list(blocks("yaml")))
def test_every_yaml_block_passes_config_check(text, tmp_path):
    file = tmp_path / "run.yml"
    file.write_text(text)
    complete = "save_args" in text and "training_parameters" in text and "model_args" in text
    unshard = "unsharded_path" in text
    check_run_file(file, *([] if complete or unshard else ["--fragment"]))


@pytest.mark.parametrize("file", RUN_FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_every_shipped_run_file_passes_config_check(file):
    check_run_file(file)


def scripts():
    """The python blocks of each document as one script: later blocks use what earlier ones made."""
    for document in DOCUMENTS:
        found = re.findall(r"^```python\n(.*?)^```", document.read_text(), re.M | re.S)
        if found:
            yield pytest.param("\n".join(found), id=str(document.relative_to(ROOT)))


def run_script(file):
    os.chdir(Path(file).parent)
    runpy.run_path(file, run_name="__main__")


@pytest.mark.parametrize("text", list(scripts()))
def test_the_python_blocks_of_a_document_run_in_their_order(text, tmp_path):
    """In a process of their own, which has torch loaded already."""
    file = tmp_path / "script.py"
    file.write_text(text)
    run_distributed(run_script, 1, str(file))


# Commands that install or start the tests are not run from within a test; the default run is
# short here, and in full in `.ci/run` by its own test.
_NOT_RUN = ("pip install", "uv sync", "uv run pytest", "uv pip", "UV_PROJECT_ENVIRONMENT")


def readme_commands():
    (block, *others) = [
        each.values[0] for each in blocks("bash") if each.id.startswith("README.md")
    ]
    text = "\n".join([block, *others])
    return [line for line in text.splitlines() if line and not line.startswith(_NOT_RUN)]


def test_the_readme_commands_run_in_their_order(tmp_path, lme):
    """In one folder, with the README's own run file shrunk to what a test can train."""
    text = (ROOT / "README.md").read_text()
    run = yaml.safe_load(re.search(r"^```yaml\n(.*?)^```", text, re.M | re.S)[1])
    _shrink(run)
    (tmp_path / "run.yml").write_text(yaml.safe_dump(run))
    _tokenize(tmp_path, lme)
    short = ["--set", "training_parameters.num_training_steps=4"]
    for command in readme_commands():
        words = shlex.split(command)
        if words[:2] == ["uv", "run"]:
            words = words[2:]
        assert words[0] == "lme", command
        words = words[1:]
        if words == ["train"]:
            words += [*short, "--set", "training_parameters.eval_interval=4"]
        lme(*words)


def _shrink(run):
    run["model_args"]["pretrained_config"] |= {
        "vocab_size": 512,
        "hidden_size": 96,
        "num_layers": 2,
    }
    run["training_parameters"] |= {
        "num_training_steps": 4,
        "micro_batch_size": 2,
        "eval_interval": 4,
    }
    run["datasets"][0]["class_args"] |= {"sequence_length": 64, "eval_steps": 2}
    run["mixed_precision_args"]["dtype"] = "fp32"


def _tokenize(folder, lme):
    """The token files and tokenizer that the README's run file names."""
    tokenizers = pytest.importorskip("tokenizers")
    texts = [path.read_text() for path in sorted(ROOT.glob("docs/**/*.md"))] * 4
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts, vocab_size=512, special_tokens=["<|endoftext|>"])
    (folder / "data").mkdir()
    tokenizer.save(str(folder / "data" / "tokenizer.json"))
    (folder / "text").mkdir()
    for number, text in enumerate(texts):
        (folder / "text" / f"{number}.txt").write_text(text)
    for split in ("train", "val"):
        lme(
            *("data", "tokenize", "text", "--tokenizer", "data/tokenizer.json"),
            *("--output-prefix", f"data/{split}"),
        )
