"""Launch settings of recurrences: rules by shape, and settings fixed by hand."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch

from lme_kernels.tuning import next_power_of_two

# Programs of one sequence and head that a GPU runs at once without slowing each other down.
RESIDENT_SCANS = 528
# Float32 numbers of weights that a program's registers hold.
REGISTER_WEIGHTS = 49152
# Bytes of weights that a program's shared memory holds.
SHARED_WEIGHT_BYTES = 131072


@dataclass(frozen=True, slots=True)
class ScanSettings:
    """How a kernel that walks sequences is launched."""

    block_sequences: int
    """Sequences a program walks side by side, a power of two. With 1, products are multiplications
    and sums in float32; with 8 and more they are those of tensor cores, in the dtype of the
    inputs."""
    num_warps: int
    """Warps a program."""
    ahead: int
    """Steps whose inputs are loaded before the ones before them are walked, a power of two."""

    @property
    def dot(self) -> bool:
        """Whether products are those of tensor cores."""
        return self.block_sequences > 1


# What `using_scan` fixes, for the launches of one thread or task.
FIXED: ContextVar[tuple[str, ScanSettings] | None] = ContextVar("lme_kernels_scan", default=None)


def block_of(D: int) -> int:
    """Power of two that covers a head, at least the 16 that tensor cores take."""
    return max(16, next_power_of_two(D))


def scan_settings(
    kernel: str, matrices: int, D: int, dtype: torch.dtype, sequences: int, N: int
) -> ScanSettings:
    """Launch settings of a recurrence with square matrices.

    Args:
        kernel: Name of the kernel: the op's, followed by `.forward` or `.backward`.
        matrices: Matrices that a head multiplies its state with each step.
        D: Size of a head.
        dtype: Dtype of the inputs.
        sequences: Number of sequences.
        N: Number of heads.

    Returns:
        The settings. Nothing is measured here.
    """
    fixed = FIXED.get()
    if fixed is not None and fixed[0] == kernel:
        return fixed[1]
    block = block_of(D)
    few = sequences * N <= RESIDENT_SCANS and block <= 64
    if dtype == torch.float32 or few:
        # With a thread for each channel and its neighbour no value changes layout between steps.
        num_warps = max(1, block // 16)
        if matrices > 1:
            num_warps *= 2
        return ScanSettings(1, num_warps, 4 if matrices == 1 else 2)
    block_sequences = 8 if sequences <= 8 else 16
    return ScanSettings(block_sequences, 16 if block > 128 else max(4, block // 16), 2)


def scan_candidates(matrices: int, D: int, dtype: torch.dtype) -> list[ScanSettings]:
    """List settings worth measuring for a recurrence with square matrices.

    Args:
        matrices: Matrices that a head multiplies its state with each step.
        D: Size of a head.
        dtype: Dtype of the inputs.

    Returns:
        Multiplications and sums with as many warps as their layout wants, or twice that or four
        times; tensor cores with few and more sequences and warps.
    """
    block = block_of(D)
    least = max(1, block // 16)
    found = [
        ScanSettings(1, num_warps, ahead)
        for num_warps in (least, 2 * least, 4 * least)
        for ahead in (2, 4, 8)
        if num_warps <= 16
        and matrices * block * block <= REGISTER_WEIGHTS
        # More than 128 registers of weights a thread leave too few for the rest.
        and matrices * block * block <= 128 * 32 * num_warps
    ]
    if dtype != torch.float32:
        found += [
            ScanSettings(block_sequences, num_warps, ahead)
            for block_sequences in (8, 16)
            for num_warps in (2, 4, 8, 16)
            for ahead in (1, 2, 4)
            if block // 32 <= num_warps <= block // 8
        ]
    return found


def reloads(settings: ScanSettings, matrices: int, D: int) -> bool:
    """Whether a program reads its weights again each step, because it cannot hold them."""
    numbers = matrices * block_of(D) ** 2
    if settings.dot:
        return 2 * numbers > SHARED_WEIGHT_BYTES
    return numbers > REGISTER_WEIGHTS


def matrix_settings(kernel: str, K: int, V: int) -> ScanSettings:
    """Launch settings of a recurrence whose state is a matrix, one sequence a program.

    Args:
        kernel: Name of the kernel: the op's, followed by `.forward` or `.backward`.
        K: Rows of the state.
        V: Columns of the state.

    Returns:
        The settings: a warp for each 16 rows that a tensor core takes, as far as registers allow.
    """
    fixed = FIXED.get()
    if fixed is not None and fixed[0] == kernel:
        return fixed[1]
    rows, numbers = block_of(K) // 16, block_of(K) * block_of(V)
    return ScanSettings(1, min(8, max(rows, numbers // 1024, 1)), 4)


@contextmanager
def using_scan(kernel: str, settings: ScanSettings) -> Iterator[None]:
    """Launch one kernel with given settings inside a `with` block, in this thread only.

    Args:
        kernel: Name of the kernel: the op's, followed by `.forward` or `.backward`.
        settings: What to launch it with.

    Yields:
        Nothing.
    """
    token = FIXED.set((kernel, settings))
    try:
        yield
    finally:
        FIXED.reset(token)
