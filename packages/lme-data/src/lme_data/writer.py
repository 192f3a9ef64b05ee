"""Writing a `.bin/.idx` pair: streaming, in constant memory, resumable, atomic at the end."""

import os
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import numpy as np

from lme_data.atomic import sync_directory, write_atomically
from lme_data.indexed import HEADER, MAGIC, IndexedTokens, bin_path, dtype_code, idx_path
from lme_data.manifest import Manifest, RunningSums, TokenizerInfo, save_manifest, sums_of

_BLOCK = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class WriterPosition:
    """How far a writer had come: enough to cut its unfinished files back to that point."""

    bin_bytes: int
    """Bytes of tokens."""
    num_sequences: int
    """Sequences."""
    num_documents: int
    """Ended documents."""


class IndexedWriter:
    """Writes tokens to unfinished files beside the target and moves them into place at the end.

    Until `finalize`, nothing exists under the target's names; a reader never sees half a pair.
    Memory does not grow with the data.

    Args:
        prefix: Path without `.bin` or `.idx`; folders are made.
        dtype: dtype of the tokens, one of the format's.
        resume_from: A position that `position` gave earlier; the unfinished files are cut back
            to it. `None` starts anew.
    """

    def __init__(
        self, prefix: str | Path, dtype: np.dtype, *, resume_from: WriterPosition | None = None
    ) -> None:
        self.prefix = str(prefix)
        self.dtype = np.dtype(dtype)
        self._code = dtype_code(self.dtype)
        limits = np.iinfo(self.dtype) if self.dtype.kind in "iu" else None
        self._limits = (0, limits.max) if limits is not None else None
        bin_path(prefix).parent.mkdir(parents=True, exist_ok=True)
        self._sums = RunningSums()
        self._smallest: int | None = None
        self._largest: int | None = None
        start = resume_from or WriterPosition(bin_bytes=0, num_sequences=0, num_documents=0)
        self._tokens = _open_cut(self._partial("bin"), start.bin_bytes)
        self._lengths = _open_cut(self._partial("lengths"), 4 * start.num_sequences)
        self._bounds = _open_cut(self._partial("bounds"), 8 * start.num_documents)
        self._num_sequences = start.num_sequences
        self._num_documents = start.num_documents
        if start.bin_bytes:
            self._reread(start.bin_bytes)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @staticmethod
    def has_unfinished_files(prefix: str | Path) -> bool:
        """Whether an earlier writer left files to resume from."""
        return all(
            Path(f"{prefix}.{kind}.partial").exists() for kind in ("bin", "lengths", "bounds")
        )

    def add_sequence(self, tokens: np.ndarray) -> None:
        """Append one sequence to the current document."""
        self._append(tokens)
        np.array([len(tokens)], "<i4").tofile(self._lengths)
        self._num_sequences += 1

    def end_document(self) -> None:
        """End the current document after the sequences added so far."""
        np.array([self._num_sequences], "<i8").tofile(self._bounds)
        self._num_documents += 1

    def add_document(self, tokens: np.ndarray) -> None:
        """Append a document of one sequence."""
        self.add_sequence(tokens)
        self.end_document()

    def add_documents(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Append many documents of one sequence each.

        Args:
            tokens: Ids of all of them, one after another, shape (tokens,).
            lengths: Tokens of each, shape (documents,).

        Raises:
            ValueError: If the lengths do not sum to the number of tokens, or an id does not fit.
        """
        if int(lengths.sum()) != len(tokens):
            raise ValueError(f"lengths sum to {int(lengths.sum())}, tokens are {len(tokens)}")
        self._append(tokens)
        lengths.astype("<i4").tofile(self._lengths)
        first = self._num_sequences + 1
        np.arange(first, first + len(lengths), dtype="<i8").tofile(self._bounds)
        self._num_sequences += len(lengths)
        self._num_documents += len(lengths)

    def add_pair(self, prefix: str | Path) -> None:
        """Append a whole pair of the same dtype, its documents kept.

        Raises:
            ValueError: If its dtype is another.
        """
        other = IndexedTokens(prefix)
        if other.dtype != self.dtype:
            raise ValueError(
                f"{prefix} holds {other.dtype}, {self.prefix} is written as {self.dtype}: "
                "pairs of one dtype can be merged"
            )
        for start in range(0, other.num_tokens, 16 * _BLOCK):
            self._append(other.tokens[start : start + 16 * _BLOCK])
        other.lengths.tofile(self._lengths)
        for start in range(1, len(other.document_bounds), _BLOCK):
            block = other.document_bounds[start : start + _BLOCK] + self._num_sequences
            block.astype("<i8").tofile(self._bounds)
        self._num_sequences += other.num_sequences
        self._num_documents += other.num_documents

    @property
    def num_documents(self) -> int:
        """Ended documents so far."""
        return self._num_documents

    def position(self) -> WriterPosition:
        """Where the writer is, once everything before is on disk."""
        for file in (self._tokens, self._lengths, self._bounds):
            file.flush()
            os.fsync(file.fileno())
        return WriterPosition(
            bin_bytes=self._sums.length,
            num_sequences=self._num_sequences,
            num_documents=self._num_documents,
        )

    def finalize(self, tokenizer: TokenizerInfo | None = None) -> Manifest:
        """Write the index, move everything into place, write the manifest.

        Args:
            tokenizer: Recorded in the manifest.

        Returns:
            The manifest.
        """
        self.position()
        self.close()
        # An old index must not meet new tokens if the process dies between the two renames.
        idx_path(self.prefix).unlink(missing_ok=True)
        self._partial("bin").replace(bin_path(self.prefix))
        write_atomically(idx_path(self.prefix), self._write_index)
        self._partial("lengths").unlink()
        self._partial("bounds").unlink()
        sync_directory(bin_path(self.prefix).parent)
        manifest = Manifest(
            bin=self._sums.result(),
            idx=sums_of(idx_path(self.prefix)),
            num_tokens=self._sums.length // self.dtype.itemsize,
            num_documents=self._num_documents,
            smallest_id=self._smallest,
            largest_id=self._largest,
            tokenizer=tokenizer,
        )
        save_manifest(self.prefix, manifest)
        return manifest

    def close(self) -> None:
        """Close the unfinished files; they stay, to be resumed."""
        for file in (self._tokens, self._lengths, self._bounds):
            file.close()

    def _partial(self, kind: str) -> Path:
        return Path(f"{self.prefix}.{kind}.partial")

    def _append(self, tokens: np.ndarray) -> None:
        if not len(tokens):
            return
        smallest, largest = int(tokens.min()), int(tokens.max())
        if self._limits is not None and not (
            self._limits[0] <= smallest and largest <= self._limits[1]
        ):
            raise ValueError(
                f"token ids from {smallest} to {largest} do not fit {self.dtype} "
                f"({self._limits[0]} to {self._limits[1]})"
            )
        self._see_range(smallest, largest)
        content = np.ascontiguousarray(tokens, dtype=self.dtype).data
        self._tokens.write(content)
        self._sums.update(content)

    def _see_range(self, smallest: int, largest: int) -> None:
        self._smallest = smallest if self._smallest is None else min(self._smallest, smallest)
        self._largest = largest if self._largest is None else max(self._largest, largest)

    def _reread(self, num_bytes: int) -> None:
        with self._partial("bin").open("rb") as file:
            done = 0
            while done < num_bytes:
                piece = file.read(min(16 * _BLOCK, num_bytes - done))
                self._sums.update(piece)
                ids = np.frombuffer(piece, self.dtype)
                self._see_range(int(ids.min()), int(ids.max()))
                done += len(piece)

    def _write_index(self, file: BinaryIO) -> None:
        header = HEADER.pack(MAGIC, 1, self._code, self._num_sequences, self._num_documents + 1)
        file.write(header)
        lengths = _mapped(self._partial("lengths"), "<i4")
        bounds = _mapped(self._partial("bounds"), "<i8")
        for start in range(0, len(lengths), _BLOCK):
            file.write(np.ascontiguousarray(lengths[start : start + _BLOCK]).data)
        offset = 0
        for start in range(0, len(lengths), _BLOCK):
            sizes = lengths[start : start + _BLOCK].astype("<i8") * self.dtype.itemsize
            ends = offset + np.cumsum(sizes)
            file.write((ends - sizes).data)
            offset = int(ends[-1])
        file.write(np.zeros(1, "<i8").data)
        for start in range(0, len(bounds), _BLOCK):
            file.write(np.ascontiguousarray(bounds[start : start + _BLOCK]).data)


def _open_cut(path: Path, size: int) -> BinaryIO:
    """Open for appending after `size` bytes, dropping what follows them."""
    if size == 0:
        return path.open("wb")
    if not path.exists() or path.stat().st_size < size:
        raise ValueError(f"{path} is shorter than the {size} bytes to resume from")
    file = path.open("r+b")
    file.truncate(size)
    file.seek(size)
    return file


def _mapped(path: Path, dtype: str) -> np.ndarray:
    # An empty file cannot be mapped.
    return np.memmap(path, dtype, "r") if path.stat().st_size else np.empty(0, dtype)
