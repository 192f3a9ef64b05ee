"""The embedded default: real text that every machine has, made into data for a small model.

The text is the source of the running interpreter's standard library. Everything lies under
`save_args.save_path`, the data in `data/` there.
"""

import hashlib
import json
import shutil
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from lme_cli.errors import CommandError
from lme_cli.overrides import apply_overrides
from lme_cli.run_file import RunFile, parse

PROMPTS = ("def main(", "class Node:\n    def __init__(self", "import os\n\n\ndef read_file(path")
"""What the trained model completes at the end."""

DEFAULT_PATH = "./lme-quickstart"
NAME = "default.yml"
MINIMUM_BYTES = 5_000_000
LARGEST_HELD_OUT_BYTES = 65_536
"""A larger file goes to training, so that no single one dominates the validation loss."""

_LEFT_OUT = frozenset(
    {"__pycache__", "dist-packages", "idle_test", "site-packages", "test", "tests"}
)
_HELD_OUT_SHARE = 20  # of 256 hash values


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file of the corpus."""

    name: str
    """Path within the standard library, with `/`."""
    text: str
    is_held_out: bool
    """Whether it is for validation."""


def load_default(settings: Sequence[str] = ()) -> RunFile:
    """Read the embedded run file; the paths of its data follow `save_args.save_path`.

    Args:
        settings: Each of the form `section.key=value`.
    """
    text = resources.files("lme_cli").joinpath(NAME).read_text(encoding="utf-8")
    run_file = apply_overrides(parse(text, name=NAME), settings)
    save_path = (run_file.values.get("save_args") or {}).get("save_path")
    if not isinstance(save_path, str) or save_path == DEFAULT_PATH:
        return run_file
    moved = _moved(run_file.values, save_path)
    # Anyone who reads `run.yml` later must find the data too.
    moved_text = yaml.safe_dump(moved, sort_keys=False)
    return RunFile(run_file.name, moved, run_file.places, moved_text)


def collect(root: Path | None = None) -> list[SourceFile]:
    """Read the standard library's sources; tests and installed packages are left out.

    Args:
        root: The library's folder; the running interpreter's if `None`.

    Returns:
        Non-empty UTF-8 files in the order of their names. Which are held out depends on names
        and sizes alone.

    Raises:
        CommandError: If there are less than 5 MB, as where the library is packed into an archive.
    """
    folder = root or Path(sysconfig.get_paths()["stdlib"])
    files = [_read(path, folder) for path in sorted(folder.rglob("*.py"))]
    found = [each for each in files if each is not None]
    size = sum(len(each.text) for each in found)
    if size < MINIMUM_BYTES:
        raise CommandError(
            f"the standard library in {folder} has {size / 1e6:.1f} MB of sources, too few to "
            "train on; give `lme train` a run file with data of your own"
        )
    return found


def prepare(
    directory: Path, *, vocab_size: int, say: Callable[[str], None], root: Path | None = None
) -> None:
    """Make tokenizer and token files, unless they are there.

    Args:
        directory: The run's data folder; it appears when everything in it is complete.
        vocab_size: Of the tokenizer.
        say: Told what is going on, one sentence at a time.
        root: As in `collect`.
    """
    if (directory / "corpus.json").exists():
        return
    from lme_data.tokenizer import train_byte_level_bpe

    files = collect(root)
    training = [each for each in files if not each.is_held_out]
    size = sum(len(each.text) for each in files)
    held_out = len(files) - len(training)
    say(
        f"corpus: {len(files)} files of Python's standard library, {size / 1e6:.1f} MB, "
        f"{held_out} files held out"
    )
    partial = directory.with_name(directory.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    text_folder = partial / "text"
    text_folder.mkdir()
    paths: list[Path] = []
    for number, each in enumerate(training):
        paths.append(text_folder / f"{number}.py")
        paths[-1].write_text(each.text, encoding="utf-8")
    tokenizer = train_byte_level_bpe(paths, vocab_size=vocab_size)
    shutil.rmtree(text_folder)
    tokenizer.save(partial / "tokenizer")
    say(f"tokenizer: byte-level BPE, {tokenizer.vocab_size} tokens")
    counts = {
        "train": _write_tokens(partial / "train", training, tokenizer),
        "val": _write_tokens(
            partial / "val", [each for each in files if each.is_held_out], tokenizer
        ),
    }
    say(f"tokens: {counts['train']:,} for training, {counts['val']:,} for validation")
    listing = {
        "files": [
            {"name": each.name, "split": "val" if each.is_held_out else "train"} for each in files
        ],
        "tokens": counts,
    }
    (partial / "corpus.json").write_text(json.dumps(listing, indent=1) + "\n", encoding="utf-8")
    if directory.exists():
        shutil.rmtree(directory)
    partial.rename(directory)


def _write_tokens(prefix: Path, files: Sequence[SourceFile], tokenizer: Any) -> int:
    """Write one document a file; the tokenizer is lme_data's, imported late."""
    import numpy as np

    from lme_data.indexed import token_dtype
    from lme_data.manifest import TokenizerInfo
    from lme_data.writer import IndexedWriter

    info = TokenizerInfo(
        name="tokenizer",
        sha256=tokenizer.fingerprint(),
        vocab_size=tokenizer.vocab_size,
        eos_token_id=tokenizer.eos_token_id,
    )
    with IndexedWriter(prefix, token_dtype(tokenizer.vocab_size)) as writer:
        for batch in _groups(files, 64):
            for ids in tokenizer.encode_batch([each.text for each in batch]):
                writer.add_document(np.array([*ids, tokenizer.eos_token_id]))
        return writer.finalize(info).num_tokens


def _groups(files: Sequence[SourceFile], size: int) -> Iterator[Sequence[SourceFile]]:
    for start in range(0, len(files), size):
        yield files[start : start + size]


def _read(path: Path, folder: Path) -> SourceFile | None:
    relative = path.relative_to(folder)
    if _LEFT_OUT & set(relative.parts):
        return None
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    if not text.strip():
        return None
    name = relative.as_posix()
    chosen = hashlib.sha256(name.encode()).digest()[0] < _HELD_OUT_SHARE
    return SourceFile(name, text, chosen and len(text) <= LARGEST_HELD_OUT_BYTES)


def _moved(value: Any, save_path: str) -> Any:
    """Replace the default folder at the start of every path in a run file's values."""
    if isinstance(value, dict):
        return {key: _moved(each, save_path) for key, each in value.items()}
    if isinstance(value, list):
        return [_moved(each, save_path) for each in value]
    if isinstance(value, str) and value.startswith(DEFAULT_PATH + "/"):
        return save_path.rstrip("/") + value.removeprefix(DEFAULT_PATH)
    return value
