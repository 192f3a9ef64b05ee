"""The side file of a `.bin/.idx` pair: sizes, checksums, range of ids, tokenizer; and `verify`."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import google_crc32c
import numpy as np

from lme_data.atomic import write_json_atomically
from lme_data.indexed import CorruptDataError, IndexedTokens, bin_path, idx_path

FORMAT_VERSION = 1
"""Version of the manifest that is written."""
CHUNK_BYTES = 64 * 1024 * 1024
"""Bytes under one checksum."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerInfo:
    """Which tokenizer made the ids."""

    name: str
    """As it was given when the text was tokenised."""
    sha256: str
    """SHA-256 of its serialised form."""
    vocab_size: int
    """Ids it can produce: 0 to this, exclusive."""
    eos_token_id: int | None = None
    """Its end-of-text token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FileSums:
    """Length and checksums of one file."""

    length: int
    """Bytes."""
    crc32c: list[int]
    """CRC-32C of each 64 MiB, the last one shorter."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a pair is said to hold."""

    bin: FileSums
    """The tokens."""
    idx: FileSums
    """The index."""
    num_tokens: int
    """Tokens."""
    num_documents: int
    """Documents."""
    smallest_id: int | None
    """Smallest token id, `None` in an empty pair."""
    largest_id: int | None
    """Largest token id, `None` in an empty pair."""
    tokenizer: TokenizerInfo | None = None
    """Where the ids come from, if known."""
    format_version: int = FORMAT_VERSION
    """Version of this side file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyReport:
    """What `verify` found."""

    prefix: str
    """The pair."""
    faults: list[str] = field(default_factory=list)
    """One sentence each; empty means sound."""
    has_manifest: bool = False
    """Whether there was a side file; without it only the structure can be checked."""
    bytes_checked: int = 0
    """Bytes whose checksum was compared."""
    num_tokens: int = 0
    """Tokens of the pair, if it could be opened."""
    num_documents: int = 0
    """Documents of the pair, if it could be opened."""

    @property
    def is_sound(self) -> bool:
        """Whether nothing was found."""
        return not self.faults


class RunningSums:
    """Length and chunk checksums of bytes as they are written."""

    def __init__(self) -> None:
        self._length = 0
        self._finished: list[int] = []
        self._crc = 0

    @property
    def length(self) -> int:
        """Bytes seen so far."""
        return self._length

    def update(self, content: bytes | memoryview) -> None:
        """Add bytes."""
        view = memoryview(content).cast("B")
        while len(view):
            room = CHUNK_BYTES - self._length % CHUNK_BYTES
            part = view[:room]
            # The C implementation takes bytes only.
            self._crc = google_crc32c.extend(self._crc, bytes(part))
            self._length += len(part)
            if self._length % CHUNK_BYTES == 0:
                self._finished.append(self._crc)
                self._crc = 0
            view = view[room:]

    def result(self) -> FileSums:
        """Sums of everything seen."""
        unfinished = [self._crc] if self._length % CHUNK_BYTES else []
        return FileSums(length=self._length, crc32c=[*self._finished, *unfinished])


def manifest_path(prefix: str | Path) -> Path:
    """Path of the side file of a prefix."""
    return Path(f"{prefix}.manifest.json")


def sums_of(path: Path, on_bytes: Callable[[int], None] | None = None) -> FileSums:
    """Length and checksums of a file, read in pieces of 8 MiB.

    Args:
        path: The file.
        on_bytes: Called with the number of bytes of each piece read.
    """
    sums = RunningSums()
    with path.open("rb") as file:
        while piece := file.read(8 * 1024 * 1024):
            sums.update(piece)
            if on_bytes is not None:
                on_bytes(len(piece))
    return sums.result()


def write_manifest(prefix: str | Path, tokenizer: TokenizerInfo | None = None) -> Manifest:
    """Read a pair once and write its side file.

    Args:
        prefix: The pair.
        tokenizer: Where its ids come from, if known.

    Raises:
        CorruptDataError: If the pair contradicts itself.
    """
    tokens = IndexedTokens(prefix)
    smallest, largest = id_range(tokens.tokens)
    manifest = Manifest(
        bin=sums_of(bin_path(prefix)),
        idx=sums_of(idx_path(prefix)),
        num_tokens=tokens.num_tokens,
        num_documents=tokens.num_documents,
        smallest_id=smallest,
        largest_id=largest,
        tokenizer=tokenizer,
    )
    save_manifest(prefix, manifest)
    return manifest


def save_manifest(prefix: str | Path, manifest: Manifest) -> None:
    """Write a side file, atomically."""
    write_json_atomically(manifest_path(prefix), asdict(manifest))


def read_manifest(prefix: str | Path) -> Manifest | None:
    """Read the side file of a pair.

    Returns:
        `None` if there is none.

    Raises:
        CorruptDataError: If it is no manifest, or of a version this package does not know.
    """
    path = manifest_path(prefix)
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version = content["format_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptDataError(f"{path}: not a manifest: {error}") from error
    if version != FORMAT_VERSION:
        raise CorruptDataError(
            f"{path}: manifest version {version}, this lme-data reads {FORMAT_VERSION}; "
            "use a newer lme-data, or remove the file and write it anew with `write_manifest`"
        )
    try:
        tokenizer = content.pop("tokenizer", None)
        return Manifest(
            bin=FileSums(**content.pop("bin")),
            idx=FileSums(**content.pop("idx")),
            tokenizer=None if tokenizer is None else TokenizerInfo(**tokenizer),
            **content,
        )
    except (TypeError, KeyError) as error:
        raise CorruptDataError(f"{path}: not a manifest: {error}") from error


def verify(prefix: str | Path, on_bytes: Callable[[int], None] | None = None) -> VerifyReport:
    """Check a pair wholly: structure, and every byte against the side file if there is one.

    Args:
        prefix: The pair.
        on_bytes: Called with the number of bytes of each piece read, for progress.

    Returns:
        The faults; files that are missing or unreadable are faults too.
    """
    faults: list[str] = []
    num_tokens = num_documents = checked = 0
    manifest = None
    try:
        tokens = IndexedTokens(prefix)
        num_tokens, num_documents = tokens.num_tokens, tokens.num_documents
    except (CorruptDataError, FileNotFoundError) as error:
        faults.append(str(error))
    try:
        manifest = read_manifest(prefix)
    except CorruptDataError as error:
        faults.append(str(error))
    if manifest is not None:
        for path, said in (
            (bin_path(prefix), manifest.bin),
            (idx_path(prefix), manifest.idx),
        ):
            if path.is_file():
                found = sums_of(path, on_bytes)
                checked += found.length
                faults.extend(_differences(path, said, found))
        if not faults:
            faults.extend(_content_differences(prefix, manifest))
    return VerifyReport(
        prefix=str(prefix),
        faults=faults,
        has_manifest=manifest is not None,
        bytes_checked=checked,
        num_tokens=num_tokens,
        num_documents=num_documents,
    )


def id_range(tokens: np.ndarray) -> tuple[int | None, int | None]:
    """Smallest and largest id, `None` of no tokens; read in blocks of 16 Mi tokens."""
    smallest = largest = None
    for start in range(0, len(tokens), 1 << 24):
        block = tokens[start : start + (1 << 24)]
        low, high = int(block.min()), int(block.max())
        smallest = low if smallest is None else min(smallest, low)
        largest = high if largest is None else max(largest, high)
    return smallest, largest


def _differences(path: Path, said: FileSums, found: FileSums) -> list[str]:
    if said.length != found.length:
        return [f"{path}: {found.length} bytes, the manifest says {said.length}"]
    if len(said.crc32c) != len(found.crc32c):
        return [f"{path}: the manifest has {len(said.crc32c)} checksums, not {len(found.crc32c)}"]
    return [
        f"{path}: bytes {number * CHUNK_BYTES} to "
        f"{min((number + 1) * CHUNK_BYTES, found.length)} do not match their checksum"
        for number, (one, other) in enumerate(zip(said.crc32c, found.crc32c, strict=True))
        if one != other
    ]


def _content_differences(prefix: str | Path, manifest: Manifest) -> list[str]:
    tokens = IndexedTokens(prefix)
    smallest, largest = id_range(tokens.tokens)
    pairs = (
        ("tokens", manifest.num_tokens, tokens.num_tokens),
        ("documents", manifest.num_documents, tokens.num_documents),
        ("smallest id", manifest.smallest_id, smallest),
        ("largest id", manifest.largest_id, largest),
    )
    return [
        f"{prefix}: the manifest says {said} as {what}, the files have {found}"
        for what, said, found in pairs
        if said != found
    ]
