"""The same tokens as a zarr v3 store: one array of ids, one of document offsets.

Any zarr v3 reader opens it; here it is read through tensorstore, from disk or object storage.
`tokens` is one-dimensional, compressed with zstd in chunks that are packed into shards;
`document_offsets` has one entry more than there are documents. The manifest of the pair is in the
attributes of the group, which is written last: a store without it is not finished.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lme_data.indexed import CorruptDataError, IndexedTokens
from lme_data.manifest import (
    FORMAT_VERSION,
    FileSums,
    Manifest,
    RunningSums,
    TokenizerInfo,
    read_manifest,
    write_manifest,
)
from lme_data.writer import IndexedWriter

if TYPE_CHECKING:
    import tensorstore

CHUNK_TOKENS = 1 << 18
"""Tokens compressed together: what a random read has to fetch."""
SHARD_TOKENS = 1 << 25
"""Tokens in one file or object."""


class TokenStore:
    """A finished token store.

    Args:
        location: Folder, or a URL that tensorstore knows (`gs://`, `s3://`, `http://`).

    Raises:
        CorruptDataError: If there is no finished store, or it contradicts itself.
        ValueError: If tensorstore is not installed.
    """

    def __init__(self, location: str | Path) -> None:
        self._location = str(location)
        content = _store(self._location).read("zarr.json").result()
        if content.state != "value":
            raise CorruptDataError(f"{location}: no finished token store is there")
        try:
            attributes = json.loads(content.value)["attributes"]
            stored = dict(attributes["lme_data"])
            tokenizer = stored.pop("tokenizer")
            self.manifest = Manifest(
                bin=FileSums(**stored.pop("bin")),
                idx=FileSums(**stored.pop("idx")),
                tokenizer=None if tokenizer is None else TokenizerInfo(**tokenizer),
                **stored,
            )
            """What the store is said to hold."""
        except (ValueError, KeyError, TypeError) as error:
            raise CorruptDataError(f"{location}: not a token store: {error}") from error
        if self.manifest.format_version != FORMAT_VERSION:
            raise CorruptDataError(
                f"{location}: token store version {self.manifest.format_version}, this lme-data "
                f"reads {FORMAT_VERSION}; use a newer lme-data"
            )
        self._tokens = _open(f"{self._location.rstrip('/')}/tokens/")
        offsets = _open(f"{self._location.rstrip('/')}/document_offsets/")
        self.document_offsets = np.asarray(offsets.read().result())
        """First token of each document, and the number of tokens, int64."""
        if self.document_offsets[-1] != self.num_tokens or self.num_tokens != self._tokens.shape[0]:
            raise CorruptDataError(
                f"{location}: {self._tokens.shape[0]} tokens, its offsets end at "
                f"{self.document_offsets[-1]}, its manifest says {self.num_tokens}"
            )

    @property
    def num_tokens(self) -> int:
        """Tokens in the store."""
        return self.manifest.num_tokens

    @property
    def num_documents(self) -> int:
        """Documents in the store."""
        return len(self.document_offsets) - 1

    @property
    def dtype(self) -> np.dtype:
        """Dtype of the tokens."""
        return np.dtype(self._tokens.dtype.numpy_dtype)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens `start` to `stop`, exclusive."""
        return np.asarray(self._tokens[start:stop].read().result())

    def document(self, number: int) -> np.ndarray:
        """Tokens of one document."""
        if not 0 <= number < self.num_documents:
            raise IndexError(f"document {number} of {self.num_documents} in {self._location}")
        start, stop = self.document_offsets[number : number + 2].tolist()
        return self.read(start, stop)

    def verify(self) -> list[str]:
        """Read everything and compare it with the manifest; one sentence a fault."""
        sums = RunningSums()
        try:
            for start in range(0, self.num_tokens, SHARD_TOKENS):
                block = self.read(start, min(start + SHARD_TOKENS, self.num_tokens))
                sums.update(np.ascontiguousarray(block).data)
        except ValueError as error:
            return [f"{self._location}: unreadable: {error}"]
        found, said = sums.result(), self.manifest.bin
        if found.length != said.length:
            return [
                f"{self._location}: {found.length} bytes of tokens, the manifest says {said.length}"
            ]
        return [
            f"{self._location}: chunk {number} of the tokens does not match its checksum"
            for number, (one, other) in enumerate(zip(found.crc32c, said.crc32c, strict=True))
            if one != other
        ]


def write_token_store(prefix: str | Path, location: str | Path) -> Manifest:
    """Write the tokens of a pair as a store; sequences of a document are joined.

    Args:
        prefix: The pair.
        location: Folder or URL; must not hold a finished store.

    Returns:
        The manifest.

    Raises:
        ValueError: If a finished store is there, or tensorstore is not installed.
    """
    pair = IndexedTokens(prefix)
    manifest = read_manifest(prefix) or write_manifest(prefix)
    root = str(location).rstrip("/")
    store = _store(root)
    if store.read("zarr.json").result().state == "value":
        raise ValueError(f"{location} holds a token store already: choose another place")
    tokens = _create(f"{root}/tokens/", pair.num_tokens, pair.dtype, is_sharded=True)
    for start in range(0, pair.num_tokens, SHARD_TOKENS):
        stop = min(start + SHARD_TOKENS, pair.num_tokens)
        tokens[start:stop].write(pair.tokens[start:stop]).result()
    ends = np.concatenate(([0], np.cumsum(pair.lengths, dtype=np.int64)))
    offsets = ends[pair.document_bounds]
    array = _create(f"{root}/document_offsets/", len(offsets), np.dtype("<i8"), is_sharded=False)
    array.write(offsets).result()
    group = {
        "zarr_format": 3,
        "node_type": "group",
        "attributes": {"lme_data": asdict(manifest)},
    }
    store.write("zarr.json", json.dumps(group).encode()).result()
    return manifest


def store_to_pair(location: str | Path, prefix: str | Path) -> Manifest:
    """Write a store as a pair, one sequence a document.

    Args:
        location: Folder or URL.
        prefix: Of the pair.
    """
    store = TokenStore(location)
    lengths = np.diff(store.document_offsets)
    with IndexedWriter(prefix, store.dtype) as writer:
        first = 0
        while first < len(lengths):
            begin = int(store.document_offsets[first])
            last = int(np.searchsorted(store.document_offsets, begin + CHUNK_TOKENS, "right")) - 1
            last = min(max(last, first + 1), len(lengths))
            end = int(store.document_offsets[last])
            writer.add_documents(store.read(begin, end), lengths[first:last])
            first = last
        return writer.finalize(store.manifest.tokenizer)


def _store(location: str) -> "tensorstore.KvStore":
    return _tensorstore().KvStore.open(_kvstore(f"{location.rstrip('/')}/")).result()


def _open(location: str) -> "tensorstore.TensorStore":
    try:
        spec = {"driver": "zarr3", "kvstore": _kvstore(location)}
        return _tensorstore().open(spec, open=True, read=True).result()
    except ValueError as error:
        raise CorruptDataError(f"{location}: not readable as zarr: {error}") from error


def _create(
    location: str, length: int, dtype: np.dtype, *, is_sharded: bool
) -> "tensorstore.TensorStore":
    codecs: list[dict[str, Any]] = [
        {"name": "bytes", "configuration": {"endian": "little"}},
        {"name": "zstd", "configuration": {"level": 3}},
        {"name": "crc32c"},
    ]
    chunk = max(1, min(length, CHUNK_TOKENS))
    if is_sharded:
        # A shard is a whole number of chunks.
        shard = chunk * max(1, min(SHARD_TOKENS // chunk, -(-length // chunk)))
        inner = {"chunk_shape": [chunk], "codecs": codecs}
        codecs = [{"name": "sharding_indexed", "configuration": inner}]
        chunk = shard
    grid = {"name": "regular", "configuration": {"chunk_shape": [chunk]}}
    spec = {
        "driver": "zarr3",
        "kvstore": _kvstore(location),
        "metadata": {
            "shape": [length],
            "chunk_grid": grid,
            "data_type": dtype.name,
            "codecs": codecs,
        },
        # A chunk of zeros is written too: one that is missing is then a fault.
        "store_data_equal_to_fill_value": True,
    }
    return _tensorstore().open(spec, create=True, delete_existing=True).result()


def _kvstore(location: str) -> str | dict[str, str]:
    return location if "://" in location else {"driver": "file", "path": location}


def _tensorstore() -> Any:  # The module itself, which has no type of its own here.
    try:
        # Optional: the `zarr` extra.
        import tensorstore  # noqa: PLC0415
    except ImportError as error:
        raise ValueError("token stores need `pip install 'lme-data[zarr]'`") from error
    return tensorstore
