"""Tensors as zarr v3 arrays: their metadata, chunks, and concurrent writes and reads."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore
import torch
from torch import Tensor

from lme_parallel.checkpoint.documents import Json, encode, write_bytes
from lme_parallel.checkpoint.errors import CheckpointError
from lme_parallel.checkpoint.layout import METADATA_NAME
from lme_parallel.shards import Region, inside, overlap

Point = Callable[[str], None]
"""Called before each step of a write with its name; tests stop the process there."""

MAX_CHUNK_BYTES = 64 * 2**20
CHECKSUM_BYTES = 4
# Chunks being written or read at any time; more would hold a second copy of the model.
_IN_FLIGHT_BYTES = 8 * MAX_CHUNK_BYTES
# Large chunks are flushed while others are being written; small ones are cheaper in one batch.
_SYNC_EACH_BYTES = 2**20

_WRITING = "default"
# Saves a copy: checksums and values are taken straight from the page cache.
_READING = "memmap"

_DATA_TYPES = {
    "bool": torch.bool,
    "uint8": torch.uint8,
    "uint16": torch.uint16,
    "uint32": torch.uint32,
    "uint64": torch.uint64,
    "int8": torch.int8,
    "int16": torch.int16,
    "int32": torch.int32,
    "int64": torch.int64,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
    "complex64": torch.complex64,
    "complex128": torch.complex128,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
}
_NAMES = {dtype: name for name, dtype in _DATA_TYPES.items()}
_CODECS = [
    {"name": "bytes", "configuration": {"endian": "little"}},
    {"name": "crc32c"},
]
# Types of one byte have no byte order.
_BYTE_CODECS = [{"name": "bytes"}, {"name": "crc32c"}]


@dataclass(frozen=True, slots=True)
class ArrayLayout:
    """Shape, dtype and chunks of one array on disk."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: tuple[int, ...]
    """Elements of a chunk on each dim, at least 1; the last chunk of a dim may reach beyond it."""

    @classmethod
    def of(cls, tensor: Tensor) -> "ArrayLayout":
        """Lay out a tensor that one process holds whole.

        Raises:
            CheckpointError: If its dtype cannot be stored.
        """
        dtype_name(tensor.dtype)
        shape = tuple(tensor.shape)
        return cls(shape, tensor.dtype, chunk_shape(shape, tensor.dtype.itemsize))

    @property
    def chunk_bytes(self) -> int:
        """Size of a chunk without its checksum; every chunk file has this size plus 4."""
        return prod(self.chunks) * self.dtype.itemsize

    @property
    def grid(self) -> tuple[int, ...]:
        """Chunks on each dim."""
        return tuple(-(-size // chunk) for size, chunk in zip(self.shape, self.chunks, strict=True))

    def pieces(self) -> Iterator[tuple[str, Region]]:
        """Yield each chunk's file name inside the array and the region of the array it holds."""
        for index in product(*(range(count) for count in self.grid)):
            region = tuple(
                slice(place * chunk, min((place + 1) * chunk, size))
                for place, chunk, size in zip(index, self.chunks, self.shape, strict=True)
            )
            yield "/".join(("c", *(str(place) for place in index))), region

    def metadata(self) -> dict[str, Json]:
        """Return the content of the array's `zarr.json`."""
        return {
            "zarr_format": 3,
            "node_type": "array",
            "shape": list(self.shape),
            "data_type": _NAMES[self.dtype],
            "chunk_grid": {
                "name": "regular",
                "configuration": {"chunk_shape": list(self.chunks)},
            },
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "codecs": _BYTE_CODECS if self.dtype.itemsize == 1 else _CODECS,
            "fill_value": _fill_value(self.dtype),
            "attributes": {},
        }

    @classmethod
    def from_metadata(cls, metadata: dict[str, Json], where: str) -> "ArrayLayout":
        """Read a `zarr.json` that `metadata` wrote; nothing else is accepted.

        Raises:
            CheckpointError: If it says anything that this package does not write.
        """
        try:
            shape = _sizes(metadata["shape"], minimum=0)
            chunks = _sizes(metadata["chunk_grid"]["configuration"]["chunk_shape"], minimum=1)
            layout = cls(shape, _DATA_TYPES[metadata["data_type"]], chunks)
            if len(shape) == len(chunks) and metadata == layout.metadata():
                return layout
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{where} does not describe an array: {error!r}") from error
        raise CheckpointError(f"{where} describes an array that this version did not write")


@dataclass(frozen=True, slots=True)
class SavedTensor:
    """A tensor and the array that it becomes."""

    path: str
    """Folder inside the checkpoint: `model/<name>` or `optimizer/<name>`."""
    layout: ArrayLayout
    tensor: Tensor
    """The values, on any device."""
    region: Region | None = None
    """Where in the array they belong, on borders of chunks; `None`: they are all of it."""

    @property
    def stored_bytes(self) -> int:
        """Bytes of all chunk files."""
        count = sum(1 for _ in self.chunks())
        return count * (self.layout.chunk_bytes + CHECKSUM_BYTES)

    def chunks(self) -> Iterator[tuple[str, Region, Tensor]]:
        """Yield each chunk's file name inside the array, its region and its values."""
        for key, region in self.layout.pieces():
            if self.region is None:
                yield key, region, self.tensor[region]
            elif (part := overlap(region, self.region)) is not None:
                yield key, region, self.tensor[inside(part, self.region)]


def dtype_name(dtype: torch.dtype) -> str:
    """Return what a dtype is called on disk.

    Raises:
        CheckpointError: If it cannot be stored.
    """
    if dtype not in _NAMES:
        raise CheckpointError(f"a tensor of dtype {dtype} cannot be saved")
    return _NAMES[dtype]


def dtype_of(name: str) -> torch.dtype:
    """Return the dtype that is called `name` on disk."""
    return _DATA_TYPES[name]


def chunk_shape(shape: Sequence[int], itemsize: int) -> tuple[int, ...]:
    """Cut an array into chunks of at most 64 MiB, along the first dims, as evenly as they go.

    Args:
        shape: Elements on each dim.
        itemsize: Bytes of an element.

    Returns:
        Elements of a chunk on each dim, at least 1.
    """
    chunks = [max(1, size) for size in shape]
    for dim, size in enumerate(chunks):
        row_bytes = prod(chunks[dim + 1 :]) * itemsize
        if size * row_bytes <= MAX_CHUNK_BYTES:
            break
        parts = -(-size // max(1, MAX_CHUNK_BYTES // row_bytes))
        chunks[dim] = -(-size // parts)
    return tuple(chunks)


def create_arrays(root: Path, layouts: Mapping[str, ArrayLayout], point: Point) -> dict[str, int]:
    """Make the folders and metadata of arrays.

    Args:
        root: The checkpoint's directory.
        layouts: By folder inside it.
        point: Called before each step.

    Returns:
        Size in bytes of every file that the arrays will have, by path relative to `root`.
    """
    files = {}
    for path, layout in layouts.items():
        point(f"create {path}")
        (root / path).mkdir()
        metadata = f"{path}/{METADATA_NAME}"
        point(f"write {metadata}")
        content = encode(layout.metadata(), metadata)
        write_bytes(root / metadata, content)
        files[metadata] = len(content)
        for key, _ in layout.pieces():
            files[f"{path}/{key}"] = layout.chunk_bytes + CHECKSUM_BYTES
    return files


def write_arrays(root: Path, saved: Iterable[SavedTensor], point: Point) -> list[str]:
    """Write tensors into arrays that were created, several chunks at a time.

    Args:
        root: The checkpoint's directory.
        saved: Tensors; those elsewhere than on the CPU are copied chunk by chunk.
        point: Called before each step.

    Returns:
        Paths of the files written, relative to `root`. Not all of them are on disk yet: sync them.

    Raises:
        CheckpointError: If the disk is full or a write fails.
    """
    files = []
    window = _Window()
    try:
        for each in saved:
            point(f"open {each.path}")
            store = _open(root / each.path, each.layout, _WRITING)
            for key, region, part in each.chunks():
                point(f"write {each.path}/{key}")
                values = _as_numpy(part.detach().cpu())
                written = store[region].write(values, can_reference_source_data_indefinitely=True)
                files.append(f"{each.path}/{key}")
                window.add(written, each.layout.chunk_bytes, f"{each.path}/{key}")
            point(f"written {each.path}")
        window.drain()
        point("await arrays")
    except OSError as error:
        raise CheckpointError(f"{root} cannot be written: {error.strerror}") from error
    finally:
        window.settle()
    return files


def read_arrays(
    root: Path, wanted: Iterable[tuple[str, ArrayLayout, Region | None, Tensor]]
) -> None:
    """Read arrays or regions of them into tensors, several chunks at a time.

    Args:
        root: The checkpoint's directory.
        wanted: Folder, layout, region (`None`: all) and target on any device, of the region's
            shape; another dtype is converted.

    Raises:
        CheckpointError: If a chunk is damaged.
    """
    window = _Window()
    try:
        for path, layout, region, target in wanted:
            direct = target.dtype == layout.dtype and target.is_contiguous()
            direct = direct and target.device.type == "cpu"
            values = target if direct else torch.empty(target.shape, dtype=layout.dtype)
            _start_reading(window, root / path, layout, region, values.detach())
            if not direct:
                window.drain()
                with torch.no_grad():
                    target.copy_(values)
        window.drain()
    finally:
        window.settle()


def _start_reading(
    window: "_Window", path: Path, layout: ArrayLayout, region: Region | None, values: Tensor
) -> None:
    store = _open(path, layout, _READING)
    for key, held in layout.pieces():
        part = held if region is None else overlap(held, region)
        if part is None:
            continue
        place = part if region is None else inside(part, region)
        target = tensorstore.array(_as_numpy(values[place]))
        # Both domains begin at zero, as a slice of a store keeps its place otherwise.
        source = store[part][tensorstore.d[:].translate_to[0]] if part else store
        window.add(target.write(source), layout.chunk_bytes, f"{path}/{key}")


class _Window:
    """Transfers under way, at most so many bytes of them."""

    def __init__(self) -> None:
        self._under_way: deque[tuple[Any, int, str]] = deque()
        self._bytes = 0

    def add(self, future: Any, size: int, name: str) -> None:  # tensorstore's futures
        self._under_way.append((future, size, name))
        self._bytes += size
        while self._bytes > _IN_FLIGHT_BYTES:
            self._finish_first()

    def drain(self) -> None:
        while self._under_way:
            self._finish_first()

    def settle(self) -> None:
        """Wait for what is left after a failure, so that nobody writes into freed memory."""
        while self._under_way:
            future, _, _ = self._under_way.popleft()
            future.exception()

    def _finish_first(self) -> None:
        future, size, name = self._under_way.popleft()
        self._bytes -= size
        try:
            future.result()
        except (ValueError, OSError, RuntimeError) as error:
            raise CheckpointError(f"{name}: {error}") from error


def _open(path: Path, layout: ArrayLayout, mode: str) -> Any:  # tensorstore ships no types
    """Open an array by what we know of it, reading no metadata."""
    spec = {
        "driver": "zarr3",
        "kvstore": {
            "driver": "file",
            "path": f"{path.resolve()}/",
            "file_io_sync": layout.chunk_bytes >= _SYNC_EACH_BYTES,
            "file_io_mode": {"mode": mode},
        },
        "metadata": {key: value for key, value in layout.metadata().items() if key != "attributes"},
        # A chunk of zeros that is not written could not be told from one that was lost.
        "store_data_equal_to_fill_value": True,
    }
    try:
        return tensorstore.open(spec, open=True, assume_metadata=True).result()
    except ValueError as error:
        raise CheckpointError(f"{path} cannot be opened: {error}") from error


def _as_numpy(tensor: Tensor) -> np.ndarray:
    """View a CPU tensor as numpy, low-precision floats included."""
    if tensor.dtype in (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2):
        bits = tensor.view(torch.int16 if tensor.dtype.itemsize == 2 else torch.int8)
        return bits.numpy().view(tensorstore.dtype(_NAMES[tensor.dtype]).numpy_dtype)
    return tensor.numpy()


def _fill_value(dtype: torch.dtype) -> Json:
    if dtype == torch.bool:
        return False
    if dtype.is_complex:
        return [0.0, 0.0]
    return 0.0 if dtype.is_floating_point else 0


def _sizes(value: Json, minimum: int) -> tuple[int, ...]:
    if not isinstance(value, list) or len(value) > 64:
        raise ValueError(f"sizes must be a list, got {value!r:.100}")
    for size in value:
        if type(size) is not int or not minimum <= size < 2**62:
            raise ValueError(f"a size must be a whole number from {minimum}, got {size!r:.100}")
    return tuple(value)
