"""Launch settings of chunked recurrences: rules by shape, and settings fixed by hand."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import product
from types import MappingProxyType

import torch

from lme_kernels._triton_chunks import block_of

# Programs below which walking a sequence in one go leaves a GPU idle.
WALKING_PROGRAMS = 96
# Channels of a key above which sequences are never walked in one go.
WALKED_KEYS = 128
# Bytes that a program may have on the smallest GPU that the kernels are made for.
SHARED_BYTES = 200 * 1024


@dataclass(frozen=True, slots=True)
class ChunkSettings:
    """How a kernel over chunks is launched."""

    chunk: int
    """Tokens of a chunk, a power of two, at least 16. "states" and "keys" take that of the kernel
    that they work for: "outputs" or "gradients"."""
    block_key: int
    """Rows of the state that a program holds, a power of two."""
    block_value: int
    """Columns of the state that a program holds at once, a power of two."""
    num_warps: int
    """Warps a program."""
    num_stages: int
    """Chunks or blocks that are loaded ahead, the one that is worked on among them."""


# What `using_chunks` fixes, for the launches of one thread or task.
FIXED: ContextVar[Mapping[str, ChunkSettings]] = ContextVar(
    "lme_kernels_chunks", default=MappingProxyType({})
)


def chunk_settings(
    kernel: str,
    dtype: torch.dtype,
    K: int,
    V: int,
    rows: int,
    tokens: int,
    *,
    channels: bool = False,
) -> ChunkSettings:
    """Launch settings of a kernel of a chunked recurrence.

    Args:
        kernel: "walk", "states", "outputs", "gradients" or "keys".
        dtype: Dtype of the inputs.
        K: Channels of a key.
        V: Channels of a value.
        rows: Sequences times heads, each walked by programs of its own.
        tokens: Tokens of a sequence, or of all if packed.
        channels: Whether each channel decays by itself.

    Returns:
        The settings. Nothing is measured here.
    """
    fixed = FIXED.get()
    if kernel in fixed:
        return fixed[kernel]
    key, value = block_of(K), block_of(V)
    exact = dtype == torch.float32
    # Sums of decays over more tokens round more, which float32 shows: sooner with one a channel.
    chunk = min(64 if not exact else 16 if channels else 32, block_of(tokens))
    if kernel == "walk":
        # The narrower a program's values, the more programs, and the oftener keys are read.
        block = min(value, 64 if rows * (value // min(value, 64)) >= WALKING_PROGRAMS else 32)
        if exact or key > 128:
            block = min(block, 32)
        return ChunkSettings(chunk, key, block, 8 if exact else 4, 1 if exact else 2)
    if kernel == "states":
        # Four programs to a multiprocessor, which hide each other's steps.
        stages = 1 if exact else 3
        return ChunkSettings(chunk, min(key, 64), min(value, 32 if exact else 64), 4, stages)
    if kernel == "outputs":
        block = min(value, 32 if exact else 128 if key <= 128 else 64)
        return ChunkSettings(chunk, key, block, 8 if exact or key > 128 else 4, 1)
    if kernel == "gradients":
        # Wider blocks of values do not fit into registers beside two gradients of keys' width.
        block = min(value, 16 if exact else 32)
        return ChunkSettings(chunk, key, block, 8, 1 if exact else 2 if key > 128 else 3)
    return ChunkSettings(chunk, min(key, 64), value, 4, 1)


def chunk_candidates(kernel: str, dtype: torch.dtype, K: int, V: int) -> list[ChunkSettings]:
    """List settings worth measuring for a kernel of a chunked recurrence.

    Args:
        kernel: As in `chunk_settings`.
        dtype: Dtype of the inputs.
        K: Channels of a key.
        V: Channels of a value.

    Returns:
        Chunks, blocks, warps and stages that a program's shared memory and registers can hold.
    """
    key, value = block_of(K), block_of(V)
    bytes_each = 4 if dtype == torch.float32 else 2
    free = kernel in ("states", "keys")
    found = []
    for chunk, block_key, block_value, num_warps, num_stages in product(
        (64,) if free else (32, 64, 128),
        (32, 64, 128) if free else (key,),
        (16, 32, 64, 128),
        (4, 8),
        (1,) if kernel == "outputs" else (2, 3, 4) if kernel == "states" else (1, 2, 3),
    ):
        # What a stage loads, beside the queries and keys of a chunk and the gradients of scores.
        state = block_key * block_value
        loaded = chunk * (2 * block_value if kernel == "gradients" else block_value)
        loaded += 2 * state if kernel == "gradients" else chunk * block_key
        held = bytes_each * (2 * chunk * (block_key + chunk) + state + num_stages * loaded)
        accumulated = state + chunk * (block_value + chunk)
        if kernel == "gradients":
            accumulated += 2 * chunk * block_key
        if (
            block_key <= key
            and block_value <= value
            and held <= SHARED_BYTES
            # More than 200 float32 numbers a thread spill; fewer than 16 leave it idle.
            and 16 * 32 * num_warps <= accumulated <= 200 * 32 * num_warps
        ):
            found.append(ChunkSettings(chunk, block_key, block_value, num_warps, num_stages))
    return found


def walks(rows: int, K: int, V: int) -> bool:
    """Whether one kernel walks whole sequences and writes outputs, because programs suffice.

    Args:
        rows: Sequences times heads.
        K: Channels of a key.
        V: Channels of a value.
    """
    fixed = FIXED.get()
    if "walk" in fixed or "outputs" in fixed:
        return "walk" in fixed
    # With wider keys, which take eight warps, this kernel faulted on an H100.
    return K <= WALKED_KEYS and rows * (block_of(V) // min(block_of(V), 32)) >= WALKING_PROGRAMS


@contextmanager
def using_chunks(kernel: str, settings: ChunkSettings) -> Iterator[None]:
    """Launch one kernel with given settings inside a `with` block, in this thread only.

    Settings of "walk" or of "outputs" decide too whether a sequence is walked in one go.

    Args:
        kernel: As in `chunk_settings`.
        settings: What to launch it with.

    Yields:
        Nothing.
    """
    token = FIXED.set({**FIXED.get(), kernel: settings})
    try:
        yield
    finally:
        FIXED.reset(token)
