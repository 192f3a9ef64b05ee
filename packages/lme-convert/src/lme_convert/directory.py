"""Model directories: `config.json`, safetensors read lazily by region, and their writer."""

import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lme_convert.errors import ModelDirectoryError
from lme_convert.files import contained_file, read_json_object, write_json
from lme_convert.shards import (
    DEFAULT_SHARD_BYTES,
    DTYPE_NAMES,
    INDEX_FILE,
    SINGLE_FILE,
    write_shards,
)
from lme_convert.staging import staged_directory

FORMAT_VERSION = 1
"""Of our `config.json`."""

OUR_MODEL_TYPES = ("gpt_base", "gpt_crosslayer", "ladder_residual", "palm")
"""`model_type` of architectures of ours; any other value belongs to a HuggingFace family."""

Region = tuple[slice, ...]
"""One slice a dim, step 1; missing trailing dims are whole."""

TOKENIZER_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "merges.txt",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tekken.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)
"""Files that travel with the weights; nothing else is copied."""

_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


class ModelDirectory:
    """A model directory, opened for reading; tensors are read when asked for.

    Every file must lie in the directory itself (`lme_convert.files.contained_file`).

    Args:
        path: Directory with `config.json` and `model.safetensors`, or shards and their index.

    Raises:
        ModelDirectoryError: If anything in it is missing, malformed or cannot be trusted.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise ModelDirectoryError(f"`{self.path}` is not a directory")
        if not (self.path / "config.json").exists():
            raise ModelDirectoryError(_explain_missing_config(self.path))
        self.config = read_json_object(contained_file(self.path, "config.json"))
        """Contents of `config.json`."""
        self._check_config()
        self._handles: dict[str, safe_open] = {}
        self._file_of = self._locate()

    def __enter__(self) -> "ModelDirectory":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the mapped files; a later read opens them again."""
        self._handles.clear()

    @property
    def model_type(self) -> str:
        """`model_type` of `config.json`."""
        return str(self.config["model_type"])

    @property
    def is_ours(self) -> bool:
        """Whether the names and layouts are ours and not a HuggingFace family's."""
        return self.model_type in OUR_MODEL_TYPES

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all tensors, sorted."""
        return tuple(sorted(self._file_of))

    def __contains__(self, name: object) -> bool:
        return name in self._file_of

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the file's header."""
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor as stored, from the file's header."""
        stored = self._slice(name).get_dtype()
        if stored not in _DTYPES:
            raise ModelDirectoryError(
                f"tensor `{name}` in `{self.path / self._file_of[name]}` has dtype {stored}; "
                f"readable are {', '.join(sorted(_DTYPES))}"
            )
        return _DTYPES[stored]

    def tensor(self, name: str, region: Region | None = None) -> Tensor:
        """Read a tensor or a rectangular part of it.

        Args:
            name: As in `names`.
            region: Part to read; only its bytes are touched. `None` reads everything.

        Returns:
            CPU tensor, dtype as stored.

        Raises:
            ModelDirectoryError: If there is no such tensor, or its file turns out unreadable.
            ValueError: If `region` does not lie within the tensor.
        """
        part, dtype = self._slice(name), self.dtype(name)
        shape = tuple(part.get_shape())
        bounds = resolve_region(name, shape, region)
        sizes = [stop - start for start, stop in bounds]
        if 0 in sizes:
            return torch.empty(sizes, dtype=dtype)
        try:
            if region is None or not shape:
                return self._handle(self._file_of[name]).get_tensor(name)
            return part[tuple(slice(start, stop) for start, stop in bounds)]
        except (SafetensorError, OSError, RuntimeError) as error:
            raise ModelDirectoryError(f"tensor `{name}` of `{self.path}`: {error}") from error

    def tokenizer_files(self) -> list[Path]:
        """Tokenizer, chat template and generation settings that are present."""
        return tokenizer_files(self.path)

    def _check_config(self) -> None:
        where = self.path / "config.json"
        model_type = self.config.get("model_type")
        if not isinstance(model_type, str) or not model_type:
            raise ModelDirectoryError(
                f"`model_type` in `{where}` must be a name, got {model_type!r}"
            )
        if not self.is_ours:
            return
        version = self.config.get("format_version")
        if type(version) is not int or version < 1:
            raise ModelDirectoryError(
                f"`format_version` in `{where}` must be a positive integer, got {version!r}; a "
                "directory of another system with this `model_type` has other tensor names"
            )
        if version > FORMAT_VERSION:
            raise ModelDirectoryError(
                f"`format_version` in `{where}` is {version}; this version of lme-convert reads "
                f"up to {FORMAT_VERSION}: use a newer lme-convert"
            )

    def _locate(self) -> dict[str, str]:
        """File name of every tensor, checked against the files' own headers."""
        single, index = self.path / SINGLE_FILE, self.path / INDEX_FILE
        if single.exists() and index.exists():
            raise ModelDirectoryError(
                f"`{self.path}` holds both `{SINGLE_FILE}` and `{INDEX_FILE}`; remove the one "
                "that is out of date"
            )
        if index.exists():
            return self._locate_by_index()
        if not single.exists():
            raise ModelDirectoryError(_explain_missing_weights(self.path))
        return dict.fromkeys(self._handle(SINGLE_FILE).keys(), SINGLE_FILE)

    def _locate_by_index(self) -> dict[str, str]:
        where = self.path / INDEX_FILE
        weight_map = read_json_object(contained_file(self.path, INDEX_FILE)).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ModelDirectoryError(f"`weight_map` in `{where}` must name tensors and files")
        file_of: dict[str, str] = {}
        for name, file in weight_map.items():
            if not isinstance(file, str) or not file.endswith(".safetensors"):
                raise ModelDirectoryError(
                    f"`{where}` places tensor `{name}` in {file!r}; only safetensors files are read"
                )
            file_of[name] = file
        for file in sorted(set(file_of.values())):
            promised = {name for name, each in file_of.items() if each == file}
            stored = set(self._handle(file).keys())
            if promised != stored:
                odd = sorted(promised ^ stored)[0]
                state = "lacks" if odd in promised else "also holds"
                raise ModelDirectoryError(
                    f"`{self.path / file}` {state} `{odd}`, against `{where}`"
                )
        return file_of

    def _handle(self, file: str) -> safe_open:
        if file not in self._handles:
            path = contained_file(self.path, file)
            try:
                self._handles[file] = safe_open(path, framework="pt", device="cpu")
            except (SafetensorError, OSError, ValueError, RuntimeError) as error:
                raise ModelDirectoryError(
                    f"`{path}` is not a valid safetensors file: {error}"
                ) from error
        return self._handles[file]

    def _slice(self, name: str) -> Any:  # safetensors does not export the type
        if name not in self._file_of:
            raise ModelDirectoryError(f"`{self.path}` has no tensor `{name}`")
        return self._handle(self._file_of[name]).get_slice(name)


def resolve_region(name: str, shape: Sequence[int], region: Region | None) -> list[tuple[int, int]]:
    """Start and stop of a region along every dim.

    Raises:
        ValueError: If it has more dims than `shape`, a step, or leaves the tensor.
    """
    given = () if region is None else tuple(region)
    if len(given) > len(shape):
        raise ValueError(f"region {given} of `{name}` has more dims than its shape {tuple(shape)}")
    bounds = []
    for size, part in zip(shape, given + (slice(None),) * (len(shape) - len(given)), strict=True):
        start = 0 if part.start is None else part.start
        stop = size if part.stop is None else part.stop
        if part.step not in (None, 1) or not 0 <= start <= stop <= size:
            raise ValueError(f"region {given} of `{name}` leaves its shape {tuple(shape)}")
        bounds.append((start, stop))
    return bounds


def write_model_directory(
    path: Path | str,
    config: Mapping[str, object],
    tensors: Iterable[tuple[str, Tensor]],
    *,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    tokenizer_from: Path | str | None = None,
) -> None:
    """Write a model directory of ours; it appears under its name only when it is complete.

    Tensors are written as they come: memory is one tensor beyond what the iterator holds.

    Args:
        path: Directory to make; it must not exist or be empty.
        config: Contents of `config.json`, with `model_type` and `format_version`.
        tensors: Names and tensors, in the order in which they shall lie on disk.
        max_shard_bytes: Tensor bytes in one file; a larger tensor gets a file of its own.
        tokenizer_from: Directory whose tokenizer files are copied beside the weights.

    Raises:
        ModelDirectoryError: If `path` is taken.
        ValueError: If `config` lacks `model_type` or `format_version`.
        ConversionError: If a tensor comes twice or cannot be stored.
    """
    for key in ("model_type", "format_version"):
        if key not in config:
            raise ValueError(f"`{key}` is missing in the config of the model directory `{path}`")
    with staged_directory(Path(path)) as staging:
        write_contents(staging, config, tensors, max_shard_bytes, tokenizer_from)


def write_contents(
    staging: Path,
    config: Mapping[str, object],
    tensors: Iterable[tuple[str, Tensor]],
    max_shard_bytes: int,
    tokenizer_from: Path | str | None,
) -> None:
    """Write config, weights and tokenizer files into an existing, empty directory."""
    write_json(staging / "config.json", config)
    write_shards(staging, tensors, max_shard_bytes)
    if tokenizer_from is not None:
        copy_tokenizer(Path(tokenizer_from), staging)


def tokenizer_files(directory: Path) -> list[Path]:
    """Files of `TOKENIZER_FILES` that are present, links resolved and checked.

    Raises:
        ModelDirectoryError: If one leads outside the directory or is not a regular file.
    """
    present = (name for name in TOKENIZER_FILES if (directory / name).exists())
    return [contained_file(directory, name) for name in present]


def copy_tokenizer(source: Path, destination: Path) -> None:
    """Copy the tokenizer files of one directory into another."""
    for name in TOKENIZER_FILES:
        if (source / name).exists():
            shutil.copyfile(contained_file(source, name), destination / name)


def _explain_missing_config(path: Path) -> str:
    if (path / "COMMIT").exists() or (path / "latest_checkpointed_iteration.json").exists():
        return (
            f"`{path}` is a training checkpoint, not a model directory: write one with "
            f"`lme unshard {path} OUT` first"
        )
    return f"`{path}` has no `config.json`, so it is not a model directory"


def _explain_missing_weights(path: Path) -> str:
    if (path / "COMMIT").exists():
        return (
            f"`{path}` is a training checkpoint, not a model directory: write one with "
            f"`lme unshard {path} OUT` first"
        )
    pickled = sorted([*path.glob("*.bin"), *path.glob("*.pt"), *path.glob("*.pth")])
    if pickled:
        return (
            f"`{path}` has weights only as `{pickled[0].name}`, a format that can run code on "
            "load; save the model as safetensors first"
        )
    return f"`{path}` has neither `{SINGLE_FILE}` nor `{INDEX_FILE}`"
