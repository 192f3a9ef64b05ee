"""Launch settings of chunked recurrences: rules by shape, and settings fixed by hand."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch

from lme_kernels._triton_chunks import block_of

# Programs below which walking a sequence in one go leaves a GPU idle.
WALKING_PROGRAMS = 96


@dataclass(frozen=True, slots=True)
class ChunkSettings:
    """How a kernel over chunks is launched."""

    chunk: int
    """Tokens of a chunk, a power of two, at least 16. Kernels that hand each other something a
    chunk must have the same: `states` and `outputs` of a call, `states` and `gradients`."""
    block_key: int
    """Rows of the state that a program holds, a power of two."""
    block_value: int
    """Columns of the state that a program holds at once, a power of two."""
    num_warps: int
    """Warps a program."""
    num_stages: int
    """Chunks or blocks that are loaded ahead, the one that is worked on among them."""


# What `using_chunks` fixes, for the launches of one thread or task.
FIXED: ContextVar[tuple[str, ChunkSettings] | None] = ContextVar("lme_kernels_chunks", default=None)


def chunk_settings(
    kernel: str, dtype: torch.dtype, K: int, V: int, rows: int, tokens: int
) -> ChunkSettings:
    """Launch settings of a kernel of a chunked recurrence.

    Args:
        kernel: "walk", "states", "outputs", "gradients" or "keys".
        dtype: Dtype of the inputs.
        K: Channels of a key.
        V: Channels of a value.
        rows: Sequences times heads, each walked by programs of its own.
        tokens: Tokens of a sequence, or of all if packed.

    Returns:
        The settings. Nothing is measured here.
    """
    fixed = FIXED.get()
    if fixed is not None and fixed[0] == kernel:
        return fixed[1]
    key, value = block_of(K), block_of(V)
    exact = dtype == torch.float32
    chunk = min(32 if exact else 64, block_of(tokens))
    if kernel == "walk":
        # The narrower a program's values, the more programs, and the oftener keys are read.
        block = min(value, 64 if rows * (value // min(value, 64)) >= WALKING_PROGRAMS else 32)
        if exact or key > 128:
            block = min(block, 32)
        return ChunkSettings(chunk, key, block, 8 if key > 128 or exact else 4, 1 if exact else 2)
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
        Chunks, blocks, warps and stages that the shared memory of a program can hold.
    """
    key, value = block_of(K), block_of(V)
    bytes_each = 4 if dtype == torch.float32 else 2
    found = []
    for chunk in (32, 64, 128):
        for block_key in (32, 64, 128, 256) if kernel in ("states", "keys") else (key,):
            for block_value in (16, 32, 64, 128):
                if block_key > key or block_value > value:
                    continue
                tokens, state = chunk * (block_key + block_value), block_key * block_value
                for num_stages in (1, 2, 3):
                    held = bytes_each * (2 * tokens + num_stages * (tokens + 2 * state))
                    found += [
                        ChunkSettings(chunk, block_key, block_value, num_warps, num_stages)
                        for num_warps in (4, 8)
                        if held <= 220 * 1024
                    ]
    return found


def walks(rows: int, V: int) -> bool:
    """Whether one kernel walks whole sequences and writes outputs, because programs suffice.

    Args:
        rows: Sequences times heads.
        V: Channels of a value.
    """
    fixed = FIXED.get()
    if fixed is not None:
        return fixed[0] == "walk"
    return rows * (block_of(V) // min(block_of(V), 32)) >= WALKING_PROGRAMS


@contextmanager
def using_chunks(kernel: str, settings: ChunkSettings) -> Iterator[None]:
    """Launch one kernel with given settings inside a `with` block, in this thread only.

    It decides too whether a sequence is walked in one go: where "walk" is given, and nowhere else.

    Args:
        kernel: As in `chunk_settings`.
        settings: What to launch it with.

    Yields:
        Nothing.
    """
    token = FIXED.set((kernel, settings))
    try:
        yield
    finally:
        FIXED.reset(token)
