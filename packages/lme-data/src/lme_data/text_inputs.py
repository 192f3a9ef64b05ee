"""Reading text to be tokenised: files of many kinds as one stream of batches that can be resumed."""

import gzip
import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal, cast

BATCH_BYTES = 1 << 20
"""Bytes of text of one batch, about."""
MAX_DOCUMENT_BYTES = 256 << 20
"""Largest text file that is one document."""

Kind = Literal["jsonl", "parquet", "text"]
Documents = Literal["file", "paragraph", "line"]

_JSON_ENDINGS = (".jsonl", ".jsonl.zst", ".jsonl.gz", ".json.gz", ".json.zst", ".json", ".ndjson")


@dataclass(frozen=True, slots=True)
class InputPosition:
    """A place in the stream."""

    file: int
    """Which file."""
    offset: int
    """Bytes (after decompression) or rows of it that were read."""


@dataclass(frozen=True, slots=True)
class InputBatch:
    """Some documents, not yet parsed."""

    kind: Kind
    """How `payload` is read: JSON lines, rows as (key, text) columns, or whole texts."""
    payload: bytes | list[bytes] | dict[str, list[str | None]]
    """Lines, texts, or columns by key."""
    end: InputPosition
    """Place after the batch."""
    size: int
    """Bytes on disk read for it, about, for progress."""


def list_inputs(inputs: Sequence[str | Path]) -> list[Path]:
    """Resolve files and folders to files, in order; folders are walked, sorted, without hidden ones.

    Raises:
        ValueError: If something does not exist, or nothing is left.
    """
    files: list[Path] = []
    for given in inputs:
        path = Path(given)
        if path.is_dir():
            files += sorted(
                file
                for file in path.rglob("*")
                if file.is_file()
                and not any(part.startswith(".") for part in file.relative_to(path).parts)
            )
        elif path.is_file():
            files.append(path)
        else:
            raise ValueError(f"input {path} does not exist: give text files or folders of them")
    if not files:
        raise ValueError(f"no files in {[str(given) for given in inputs]}")
    return files


def kind_of(path: Path) -> Kind:
    """How a file is read, by its ending; what is neither JSON lines nor parquet is text."""
    if path.name.endswith(".parquet"):
        return "parquet"
    return "jsonl" if path.name.endswith(_JSON_ENDINGS) else "text"


def read_batches(
    files: Sequence[Path],
    *,
    keys: Sequence[str],
    documents: Documents = "file",
    start: InputPosition | None = None,
) -> Iterator[InputBatch]:
    """Read files as batches of about 1 MiB, in order; memory does not grow with the files.

    Args:
        files: From `list_inputs`.
        keys: Columns to take from parquet files.
        documents: What one document of a text file is.
        start: Where to begin; `None` is the beginning.

    Raises:
        ValueError: If a file cannot be read; names it.
    """
    begin = start or InputPosition(0, 0)
    number = begin.file
    offset = begin.offset
    while number < len(files):
        kind = kind_of(files[number])
        if kind == "parquet":
            yield from _read_parquet(files[number], number, offset, keys)
            number += 1
        elif kind == "jsonl" or documents == "line":
            yield from _read_lines(files[number], number, offset, kind)
            number += 1
        elif documents == "paragraph":
            yield from _read_paragraphs(files[number], number, offset)
            number += 1
        else:
            batch = _read_whole_files(files, number)
            number = batch.end.file
            yield batch
        offset = 0


def _read_whole_files(files: Sequence[Path], first: int) -> InputBatch:
    texts: list[bytes] = []
    size, number = 0, first
    while number < len(files) and size < BATCH_BYTES and kind_of(files[number]) == "text":
        path = files[number]
        if path.stat().st_size > MAX_DOCUMENT_BYTES:
            raise ValueError(
                f"{path} has {path.stat().st_size} bytes, too many for one document: set "
                "`documents` to `paragraph` or `line`"
            )
        with _open(path) as file:
            texts.append(file.read())
        size += path.stat().st_size
        number += 1
    return InputBatch("text", texts, InputPosition(number, 0), size)


def _read_lines(path: Path, number: int, offset: int, kind: Kind) -> Iterator[InputBatch]:
    def build(block: bytes) -> bytes | list[bytes]:
        return block if kind == "jsonl" else block.splitlines()

    yield from _read_blocks(path, number, offset, kind, b"\n", build)


def _read_paragraphs(path: Path, number: int, offset: int) -> Iterator[InputBatch]:
    def build(block: bytes) -> bytes | list[bytes]:
        return [part.strip(b"\n") for part in block.split(b"\n\n")]

    yield from _read_blocks(path, number, offset, "text", b"\n\n", build)


def _read_blocks(
    path: Path,
    number: int,
    offset: int,
    kind: Kind,
    separator: bytes,
    build: Callable[[bytes], bytes | list[bytes]],
) -> Iterator[InputBatch]:
    """Cut a file after separators, at about `BATCH_BYTES`."""
    is_compressed = path.suffix in (".gz", ".zst")
    with _open(path) as file:
        _skip(file, path, offset)
        position, rest = offset, b""
        while True:
            piece = file.read(BATCH_BYTES)
            block = rest + piece
            # Without a separator the document is larger than a batch: read on.
            cut = block.rfind(separator) + len(separator) if piece else len(block)
            if piece and cut < len(separator):
                rest = block
                continue
            rest = block[cut:]
            position += cut
            if not piece:
                end = InputPosition(number + 1, 0)
                size = path.stat().st_size if is_compressed else cut
                yield InputBatch(kind, build(block), end, size)
                return
            size = 0 if is_compressed else cut
            yield InputBatch(kind, build(block[:cut]), InputPosition(number, position), size)


def _read_parquet(
    path: Path, number: int, offset: int, keys: Sequence[str]
) -> Iterator[InputBatch]:
    try:
        # Optional: the `hf` extra brings it.
        import pyarrow.parquet as parquet  # noqa: PLC0415
    except ImportError as error:
        raise ValueError(f"reading {path} needs `pip install 'lme-data[hf]'`") from error
    with parquet.ParquetFile(path) as file:
        names = file.schema_arrow.names
        present = [key for key in keys if key in names]
        if not present:
            raise ValueError(f"{path} has none of the columns {list(keys)}, it has {names}")
        rows, total = 0, max(1, file.metadata.num_rows)
        for group in range(file.num_row_groups):
            group_rows = file.metadata.row_group(group).num_rows
            if rows + group_rows <= offset:
                rows += group_rows
                continue
            for batch in file.iter_batches(1000, row_groups=[group], columns=present):
                rows += batch.num_rows
                if rows <= offset:
                    continue
                columns = {key: batch.column(key).to_pylist() for key in present}
                size = path.stat().st_size * batch.num_rows // total
                yield InputBatch("parquet", columns, InputPosition(number, rows), size)


def _open(path: Path) -> IO[bytes]:
    if path.suffix == ".gz":
        return cast(IO[bytes], gzip.open(path, "rb"))
    if path.suffix != ".zst":
        return path.open("rb")
    try:
        # Optional: the `zstd` extra.
        return importlib.import_module("zstandard").open(path, "rb")
    except ImportError:
        pass
    try:
        # The `hf` extra brings a reader too.
        import pyarrow  # noqa: PLC0415

        return pyarrow.input_stream(str(path), compression="zstd")
    except ImportError as error:
        raise ValueError(f"reading {path} needs `pip install 'lme-data[zstd]'`") from error


def _skip(file: IO[bytes], path: Path, offset: int) -> None:
    if path.suffix not in (".gz", ".zst"):
        file.seek(offset)
        return
    while offset:
        piece = file.read(min(offset, BATCH_BYTES))
        if not piece:
            raise ValueError(f"{path} is shorter than when it was first read")
        offset -= len(piece)
