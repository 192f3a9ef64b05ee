"""Reading the rows of an instruction dataset: a local file, a folder, or the hub."""

import gzip
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from lme_data.context import SplitName

_NAMES_OF_SPLITS: dict[SplitName, tuple[str, ...]] = {
    "train": ("train",),
    "val": ("validation", "valid", "val", "dev"),
    "test": ("test",),
}
_ENDINGS = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".parquet")


def read_rows(
    data_path: str,
    split: SplitName,
    *,
    config_name: str | None = None,
    revision: str | None = None,
) -> list[Mapping[str, object]] | None:
    """Read one split of a dataset.

    A single file is the training split. In a folder, files whose names begin with `train`,
    `validation` (`valid`, `val`, `dev`) or `test` are those splits; a folder without such names is
    the training split.

    Args:
        data_path: File, folder, or name on the hub (needs the `hf` extra).
        split: Which.
        config_name: Configuration on the hub.
        revision: Branch, tag or commit on the hub.

    Returns:
        Rows by column, or `None` if the dataset has no such split.

    Raises:
        ValueError: If nothing can be read there; says why.
    """
    path = Path(data_path)
    if path.is_dir() and not (path / "dataset_dict.json").exists():
        files = _files_of_split(path, split)
    elif path.is_file():
        files = [path] if split == "train" else []
    else:
        return _read_with_datasets(data_path, split, config_name, revision)
    if not files:
        return None
    return [row for file in files for row in _read_file(file)]


def _files_of_split(folder: Path, split: SplitName) -> list[Path]:
    files = sorted(
        file
        for file in folder.rglob("*")
        if file.is_file() and file.name.endswith(_ENDINGS) and not file.name.startswith(".")
    )
    if not files:
        raise ValueError(f"`data_path`: {folder} holds no {', '.join(_ENDINGS)} file")
    named = {
        name: [file for file in files if file.name.lower().startswith(_NAMES_OF_SPLITS[name])]
        for name in _NAMES_OF_SPLITS
    }
    if not any(named.values()):
        return files if split == "train" else []
    return named[split]


def _read_file(path: Path) -> Iterator[Mapping[str, object]]:
    if path.name.endswith(".parquet"):
        yield from _read_parquet(path)
        return
    opener = gzip.open if path.name.endswith(".gz") else open
    with opener(path, "rt", encoding="utf-8") as file:
        if path.name.removesuffix(".gz").endswith(".json"):
            text = file.read()
            if text.lstrip().startswith("["):
                yield from _objects(json.loads(text), path)
                return
            lines: Iterator[str] = iter(text.splitlines())
        else:
            lines = iter(file)
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    yield from _objects([json.loads(line)], path)
                except ValueError as error:
                    raise ValueError(f"{path}:{number}: not a JSON object: {error}") from error


def _objects(rows: list[object], path: Path) -> Iterator[Mapping[str, object]]:
    for row in rows:
        if not isinstance(row, dict):
            raise ValueError(f"{path}: a row is {type(row).__name__}, not an object")
        yield row


def _read_parquet(path: Path) -> Iterator[Mapping[str, object]]:
    try:
        # Optional: the `hf` extra brings it.
        import pyarrow.parquet as parquet  # noqa: PLC0415
    except ImportError as error:
        raise ValueError(
            f"`data_path`: reading {path} needs `pip install 'lme-data[hf]'`"
        ) from error
    with parquet.ParquetFile(path) as file:
        for batch in file.iter_batches():
            yield from batch.to_pylist()


def _read_with_datasets(
    data_path: str, split: SplitName, config_name: str | None, revision: str | None
) -> list[Mapping[str, object]] | None:
    try:
        # Optional: the `hf` extra.
        import datasets  # noqa: PLC0415
    except ImportError as error:
        raise ValueError(
            f"`data_path`: {data_path} is no file or folder here; reading it from the hub needs "
            "`pip install 'lme-data[hf]'`"
        ) from error
    try:
        if Path(data_path).is_dir():
            loaded = datasets.load_from_disk(data_path)
        else:
            loaded = datasets.load_dataset(data_path, config_name, revision=revision)
    except Exception as error:
        # The library raises errors of its own, of the hub's client and of the network.
        raise ValueError(
            f"`data_path`: {data_path!r} was found neither on disk nor on the hub: {error}"
        ) from error
    if not isinstance(loaded, Mapping):
        return _as_rows(loaded) if split == "train" else None
    for name in _NAMES_OF_SPLITS[split]:
        if name in loaded:
            return _as_rows(loaded[name])
    return None


def _as_rows(rows: Iterable[object]) -> list[Mapping[str, object]]:
    return [row for row in rows if isinstance(row, Mapping)]
