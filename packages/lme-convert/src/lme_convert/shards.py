"""Safetensors files written one tensor at a time, the same bytes for the same tensors."""

import ctypes
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from lme_convert.errors import ConversionError

DEFAULT_SHARD_BYTES = 4 * 1024**3
"""Tensor bytes in a shard, at most, unless one tensor alone is larger."""

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

DTYPE_NAMES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
}
"""Names of dtypes in a safetensors header."""

# A shard stays in memory up to this size, and its header is exact; beyond, tensors go straight to
# disk behind a header of fixed size, so that a shard of any size costs one tensor of memory.
_BUFFER_BYTES = 32 * 1024**2
_RESERVED_HEADER_BYTES = 256 * 1024
_PIECE_BYTES = 16 * 1024**2


class _Shard:
    """One file in the making."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        self._entry_bytes = len(_encode(self._entries))
        self._pending: list[Tensor] = []
        self._file: BinaryIO | None = None
        self.names: list[str] = []
        self.size_bytes = 0

    def accepts(self, name: str, tensor: Tensor, max_bytes: int) -> bool:
        """Whether `tensor` fits: size, room in a reserved header, alignment of its first byte."""
        if not self.names:
            return True
        entry_bytes = self._entry_bytes + len(_encode({name: self._entry(tensor)}))
        return (
            self.size_bytes + tensor.nbytes <= max_bytes
            and entry_bytes <= _RESERVED_HEADER_BYTES
            and self.size_bytes % tensor.itemsize == 0
        )

    def add(self, name: str, tensor: Tensor) -> None:
        entry = self._entry(tensor)
        self._entries[name] = entry
        # An upper bound: braces are counted again for every entry.
        self._entry_bytes += len(_encode({name: entry}))
        self.names.append(name)
        self.size_bytes += tensor.nbytes
        if self._file is None and self.size_bytes <= _BUFFER_BYTES:
            # A view may hold the memory of all its siblings, and its owner may write it again.
            self._pending.append(tensor.contiguous().clone())
            return
        if self._file is None:
            self._file = self._path.open("xb")
            self._file.seek(8 + _RESERVED_HEADER_BYTES)
            self._drain()
        self._write(tensor)

    def close(self) -> None:
        header = _encode(self._entries)
        if self._file is None:
            self._file = self._path.open("xb")
            header += b" " * (-len(header) % 8)
            self._file.write(len(header).to_bytes(8, "little") + header)
            self._drain()
        else:
            header = header.ljust(_RESERVED_HEADER_BYTES)
            self._file.seek(0)
            self._file.write(len(header).to_bytes(8, "little") + header)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def abandon(self) -> None:
        if self._file is not None:
            self._file.close()

    def _entry(self, tensor: Tensor) -> dict[str, object]:
        return {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [self.size_bytes, self.size_bytes + tensor.nbytes],
        }

    def _drain(self) -> None:
        for tensor in self._pending:
            self._write(tensor)
        self._pending.clear()

    def _write(self, tensor: Tensor) -> None:
        if self._file is None:
            raise RuntimeError("a shard was written before it was opened")
        # The bytes where they lie: torch's own way to them needs numpy, which torch does not bring.
        whole = tensor.contiguous()
        data = memoryview((ctypes.c_char * whole.nbytes).from_address(whole.data_ptr()))
        for start in range(0, whole.nbytes, _PIECE_BYTES):
            self._file.write(data[start : start + _PIECE_BYTES])


def write_shards(
    directory: Path, tensors: Iterable[tuple[str, Tensor]], max_shard_bytes: int
) -> dict[str, str]:
    """Write tensors to `model.safetensors`, or to shards and their index, in the order given.

    Memory: one tensor beyond what `tensors` holds, and at most 32 MiB of small ones. The bytes
    depend on names, order, dtypes, shapes and values only.

    Args:
        directory: Existing directory without weights in it.
        tensors: Names and tensors, on CPU or moved there one by one; each name once.
        max_shard_bytes: Tensor bytes in a file; a larger tensor gets a file of its own.

    Returns:
        File name of each tensor.

    Raises:
        ConversionError: If a name comes twice, a dtype has no safetensors name, or there is no
            tensor at all.
    """
    if max_shard_bytes < 1:
        raise ValueError(f"`max_shard_bytes` must be at least 1, got {max_shard_bytes}")
    shards: list[_Shard] = []
    seen: set[str] = set()
    try:
        for name, tensor in tensors:
            _check(name, tensor, seen)
            on_cpu = tensor.detach().cpu()
            if not shards or not shards[-1].accepts(name, on_cpu, max_shard_bytes):
                if shards:
                    shards[-1].close()
                shards.append(_Shard(directory / _draft_name(len(shards))))
            shards[-1].add(name, on_cpu)
            # Or they would live until the next one is made.
            del tensor, on_cpu
        if not shards:
            raise ConversionError(f"there is no tensor to write to `{directory}`")
        shards[-1].close()
    except BaseException:
        if shards:
            shards[-1].abandon()
        raise
    return _name_files(directory, shards)


def _check(name: str, tensor: Tensor, seen: set[str]) -> None:
    if name in seen or name == "__metadata__":
        raise ConversionError(f"tensor `{name}` was given twice or has a reserved name")
    if tensor.dtype not in DTYPE_NAMES:
        raise ConversionError(f"tensor `{name}` has dtype {tensor.dtype}, which cannot be stored")
    seen.add(name)


def _draft_name(number: int) -> str:
    return f"shard-{number:05d}.draft"


def _name_files(directory: Path, shards: list[_Shard]) -> dict[str, str]:
    total = len(shards)
    file_of: dict[str, str] = {}
    for number, shard in enumerate(shards):
        final = SINGLE_FILE
        if total > 1:
            final = f"model-{number + 1:05d}-of-{total:05d}.safetensors"
        (directory / _draft_name(number)).rename(directory / final)
        file_of.update(dict.fromkeys(shard.names, final))
    if total > 1:
        index = {
            "metadata": {"total_size": sum(shard.size_bytes for shard in shards)},
            "weight_map": dict(sorted(file_of.items())),
        }
        (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return file_of


def _encode(entries: dict[str, object]) -> bytes:
    return json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
