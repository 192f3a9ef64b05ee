"""The `.bin/.idx` pair: token ids of all sequences back to back, and an index of them.

Byte-compatible with the files of Megatron-LM and its relatives. Index, little-endian, unpadded:
magic (9 bytes), version 1 (uint64), dtype code (uint8), sequences s (uint64), document entries d
(uint64), s lengths in tokens (int32), s byte offsets (int64), d document bounds in sequences
(int64, first 0, last s); multimodal files add s modes (int8).
"""

import mmap
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

MAGIC = b"MMIDIDX\x00\x00"
"""First nine bytes of an index."""
DTYPES: dict[int, np.dtype] = {
    1: np.dtype("<u1"),
    2: np.dtype("<i1"),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    6: np.dtype("<f8"),
    7: np.dtype("<f4"),
    8: np.dtype("<u2"),
}
"""dtype of the tokens by the code in the index."""
HEADER = struct.Struct("<9sQBQQ")
"""Magic, version, dtype code, sequences, document entries."""

# Offsets of more sequences than this are checked in samples at open, so that opening stays quick.
_FULL_CHECK_SEQUENCES = 1_000_000


class CorruptDataError(ValueError):
    """A data file is not what its index or manifest says."""


def bin_path(prefix: str | Path) -> Path:
    """Path of the tokens of a prefix."""
    return Path(f"{prefix}.bin")


def idx_path(prefix: str | Path) -> Path:
    """Path of the index of a prefix."""
    return Path(f"{prefix}.idx")


def token_dtype(vocab_size: int) -> np.dtype:
    """Dtype that the field's writers take for a vocabulary.

    Args:
        vocab_size: Number of token ids.

    Returns:
        uint16 below 65500, else int32.
    """
    return DTYPES[8] if vocab_size < 65500 else DTYPES[4]


def dtype_code(dtype: np.dtype) -> int:
    """Code of a dtype in the index.

    Raises:
        ValueError: If the format has no code for it.
    """
    for code, known in DTYPES.items():
        if known == dtype:
            return code
    raise ValueError(f"dtype must be one of {[str(each) for each in DTYPES.values()]}, got {dtype}")


@dataclass(frozen=True, slots=True)
class IndexHeader:
    """The fixed part of an index and where its arrays lie."""

    dtype: np.dtype
    """dtype of the tokens."""
    num_sequences: int
    """Sequences in the file."""
    num_bounds: int
    """Entries of the document array: documents + 1."""

    @property
    def lengths_offset(self) -> int:
        """Byte at which the lengths begin."""
        return HEADER.size

    @property
    def pointers_offset(self) -> int:
        """Byte at which the byte offsets begin."""
        return HEADER.size + 4 * self.num_sequences

    @property
    def bounds_offset(self) -> int:
        """Byte at which the document bounds begin."""
        return HEADER.size + 12 * self.num_sequences

    @property
    def size(self) -> int:
        """Bytes of the whole index, without modes."""
        return HEADER.size + 12 * self.num_sequences + 8 * self.num_bounds


def read_header(buffer: bytes, path: Path) -> IndexHeader:
    """Parse and check the first 34 bytes of an index.

    Args:
        buffer: At least the first 34 bytes.
        path: For errors.

    Raises:
        CorruptDataError: If magic, version, dtype code or counts are wrong.
    """
    if len(buffer) < HEADER.size:
        raise CorruptDataError(f"{path}: {len(buffer)} bytes are too few for an index header")
    magic, version, code, num_sequences, num_bounds = HEADER.unpack_from(buffer)
    if magic != MAGIC:
        raise CorruptDataError(f"{path}: begins with {magic!r}, an index begins with {MAGIC!r}")
    if version != 1:
        raise CorruptDataError(f"{path}: index version {version}, known is 1")
    if code not in DTYPES:
        raise CorruptDataError(f"{path}: dtype code {code}, known are {sorted(DTYPES)}")
    # No file holds this many; larger counts would overflow the size below.
    if num_sequences > 1 << 48 or num_bounds > 1 << 48:
        raise CorruptDataError(f"{path}: absurd counts {num_sequences} and {num_bounds}")
    return IndexHeader(DTYPES[code], num_sequences, num_bounds)


class IndexedTokens:
    """A `.bin/.idx` pair, memory-mapped and checked.

    Header, sizes, document bounds and offsets are checked when it is opened; the content is
    checked by `lme_data.manifest.verify`.

    Args:
        prefix: Path without `.bin` or `.idx`.

    Raises:
        FileNotFoundError: If either file is missing.
        CorruptDataError: If the files contradict themselves or each other.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = str(prefix)
        for path in (idx_path(prefix), bin_path(prefix)):
            if not path.is_file():
                raise FileNotFoundError(
                    f"{path} does not exist: `data_path` takes the prefix of a `.bin/.idx` pair, "
                    "without the ending"
                )
        index = _map(idx_path(prefix))
        header = read_header(bytes(index[: HEADER.size]), idx_path(prefix))
        self.header = header
        self._check_index_size(len(index))
        self.lengths = np.frombuffer(index, "<i4", header.num_sequences, header.lengths_offset)
        """Tokens of each sequence, int32."""
        self.pointers = np.frombuffer(index, "<i8", header.num_sequences, header.pointers_offset)
        """Byte of the first token of each sequence, int64."""
        self.document_bounds = np.frombuffer(index, "<i8", header.num_bounds, header.bounds_offset)
        """First sequence of each document, and the number of sequences, int64."""
        content = _map(bin_path(prefix))
        self._check_arrays(len(content))
        self.tokens = np.frombuffer(content, header.dtype)
        """All token ids, one after another."""

    @property
    def dtype(self) -> np.dtype:
        """Dtype of the tokens on disk."""
        return self.header.dtype

    @property
    def num_sequences(self) -> int:
        """Sequences in the pair."""
        return self.header.num_sequences

    @property
    def num_documents(self) -> int:
        """Documents in the pair."""
        return self.header.num_bounds - 1

    @property
    def num_tokens(self) -> int:
        """Tokens in the pair."""
        return len(self.tokens)

    def __len__(self) -> int:
        return self.num_sequences

    def sequence(self, number: int, offset: int = 0, length: int | None = None) -> np.ndarray:
        """Tokens of one sequence, or a part of it, as a view of the file.

        Args:
            number: Which sequence.
            offset: Tokens to skip.
            length: Tokens to take; `None` takes the rest.
        """
        if not 0 <= number < self.num_sequences:
            raise IndexError(f"sequence {number} of {self.num_sequences} in {self.prefix}")
        total = int(self.lengths[number])
        stop = total if length is None else min(total, offset + length)
        start = int(self.pointers[number]) // self.dtype.itemsize
        return self.tokens[start + min(offset, total) : start + stop]

    def document_of(self, sequence: int) -> int:
        """Document that holds a sequence."""
        return int(np.searchsorted(self.document_bounds, sequence, side="right")) - 1

    def _check_index_size(self, size: int) -> None:
        expected = self.header.size
        if size not in (expected, expected + self.header.num_sequences):
            raise CorruptDataError(
                f"{idx_path(self.prefix)}: {size} bytes, its header asks for {expected}: "
                "the file is cut or its header is wrong"
            )

    def _check_arrays(self, content_bytes: int) -> None:
        index, itemsize = idx_path(self.prefix), self.dtype.itemsize
        bounds, count = self.document_bounds, self.num_sequences
        if len(bounds) == 0 or bounds[0] != 0 or bounds[-1] != count:
            raise CorruptDataError(f"{index}: document bounds do not run from 0 to {count}")
        end = int(self.pointers[-1]) + int(self.lengths[-1]) * itemsize if count else 0
        if end != content_bytes:
            raise CorruptDataError(
                f"{bin_path(self.prefix)}: {content_bytes} bytes, its index asks for {end}: "
                "the file is cut, or belongs to another index"
            )
        if count and self.pointers[0] != 0:
            raise CorruptDataError(f"{index}: the first sequence does not begin at byte 0")
        for begin, stop in _blocks(count):
            lengths = self.lengths[begin:stop].astype(np.int64)
            steps = np.diff(self.pointers[begin : stop + 1])
            wrong = np.flatnonzero(steps != (lengths * itemsize)[: len(steps)])
            if len(wrong):
                raise CorruptDataError(
                    f"{index}: sequence {begin + int(wrong[0]) + 1} does not begin where the one "
                    "before it ends"
                )
            if len(lengths) and lengths.min() < 0:
                raise CorruptDataError(f"{index}: a sequence has a negative length")
        for begin, stop in _blocks(len(bounds)):
            if np.any(np.diff(bounds[begin : stop + 1]) < 0):
                raise CorruptDataError(f"{index}: document bounds are not in order")


def open_all(prefixes: Sequence[str]) -> list[IndexedTokens]:
    """Open several pairs; each is checked."""
    return [IndexedTokens(prefix) for prefix in prefixes]


def _blocks(count: int) -> list[tuple[int, int]]:
    """Ranges to check: everything, or where that takes too long the ends and blocks between."""
    if count <= _FULL_CHECK_SEQUENCES:
        return [(0, count)] if count else []
    size = _FULL_CHECK_SEQUENCES // 16
    starts = np.linspace(0, count - size, 16).astype(np.int64).tolist()
    return [(start, start + size) for start in starts]


def _map(path: Path) -> mmap.mmap | bytes:
    with path.open("rb") as file:
        # An empty file cannot be mapped.
        if path.stat().st_size == 0:
            return b""
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
