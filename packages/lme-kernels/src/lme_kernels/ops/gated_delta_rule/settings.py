"""Launch settings of the gated delta rule: rules by shape, and settings fixed by hand."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch

from lme_kernels._triton_chunks import block_of

# Programs that walk sequences and leave few multiprocessors of a large GPU idle; narrower blocks
# would be twice as many, which no longer run all at once.
WALKING_PROGRAMS = 96
# Bytes of shared memory that a program may take; of Hopper's 227 KiB the compiler wants some.
SHARED_BYTES = 220 * 1024
KERNELS = ("prepare", "forward", "backward", "inputs")


@dataclass(frozen=True, slots=True)
class DeltaSettings:
    """How a kernel of the gated delta rule is launched."""

    block: int
    """Channels a program holds at once, a power of two: of keys in `prepare`, else of values."""
    num_warps: int
    """Warps a program."""
    num_stages: int
    """Chunks or blocks that are loaded ahead, the one that is worked on among them."""


# What `using_delta` fixes, for the launches of one thread or task.
FIXED: ContextVar[tuple[str, DeltaSettings] | None] = ContextVar("lme_kernels_delta", default=None)


def chunk_of(dtype: torch.dtype) -> int:
    """Tokens of a chunk: fewer in float32, whose products do not run on tensor cores."""
    return 32 if dtype == torch.float32 else 64


def delta_settings(kernel: str, dtype: torch.dtype, K: int, V: int, rows: int) -> DeltaSettings:
    """Launch settings of a kernel of the gated delta rule.

    Args:
        kernel: One of `KERNELS`.
        dtype: Dtype of the inputs.
        K: Channels of a key.
        V: Channels of a value.
        rows: Sequences times heads, each walked by programs of its own.

    Returns:
        The settings. Nothing is measured here.
    """
    fixed = FIXED.get()
    if fixed is not None and fixed[0] == kernel:
        return fixed[1]
    exact = dtype == torch.float32
    key, value = block_of(K), block_of(V)
    if kernel == "prepare":
        return DeltaSettings(min(key, 64), 4, 1)
    if kernel == "inputs":
        if exact:
            return DeltaSettings(16, 8, 1)
        return DeltaSettings(min(value, 64 if key == 128 else 32), 8 if key <= 128 else 16, 2)
    if exact:
        return DeltaSettings(16, 8, 1)
    # Wide blocks read keys less often, narrow ones give every multiprocessor something to walk.
    wide = key <= 128 and rows * (value // min(value, 64)) >= WALKING_PROGRAMS
    return DeltaSettings(min(value, 64 if wide else 32), 4 if key <= 128 else 8, 2)


def delta_candidates(kernel: str, dtype: torch.dtype, K: int, V: int) -> list[DeltaSettings]:
    """List settings worth measuring for a kernel of the gated delta rule.

    Args:
        kernel: One of `KERNELS`.
        dtype: Dtype of the inputs.
        K: Channels of a key.
        V: Channels of a value.

    Returns:
        Blocks, warps and stages whose loads the shared memory of a program can hold.
    """
    key, value, C = block_of(K), block_of(V), chunk_of(dtype)
    size = 4 if dtype == torch.float32 else 2
    found = []
    for block in (16, 32, 64, 128):
        if block > (key if kernel == "prepare" else value):
            continue
        loaded = {
            "prepare": 2 * C * block,
            "forward": 2 * C * key + 2 * C * C + C * block,
            "backward": 2 * C * key + 2 * C * C + C * block,
            "inputs": 3 * C * block + 2 * key * block,
        }[kernel]
        held = {"prepare": 0, "inputs": 2 * C * key}.get(kernel, (key + C) * block)
        found += [
            DeltaSettings(block, num_warps, num_stages)
            for num_warps in (4, 8, 16)
            for num_stages in ((1,) if kernel == "prepare" else (1, 2, 3, 4))
            if size * (held + num_stages * loaded) <= SHARED_BYTES
        ]
    return found


@contextmanager
def using_delta(kernel: str, settings: DeltaSettings) -> Iterator[None]:
    """Launch one kernel with given settings inside a `with` block, in this thread only.

    Args:
        kernel: One of `KERNELS`.
        settings: What to launch it with.

    Yields:
        Nothing.
    """
    token = FIXED.set((kernel, settings))
    try:
        yield
    finally:
        FIXED.reset(token)
