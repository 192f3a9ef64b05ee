"""Random numbers as pure functions of a key and an index.

No generator state is read or written, so a value does not depend on how many devices, threads or
processes share the work, nor on what was drawn before it.
"""

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB
# Pairs of numbers made at a time: their intermediate results stay in one core's cache, and torch
# splits simple operations over threads above this number only.
_PAIRS = 32768
# Torch splits logarithms, roots and cosines over threads from this number on.
_SPLIT = 2048


def key_of(seed: int, name: str) -> int:
    """Hash a seed and a name to a key, a signed 64-bit integer.

    Args:
        seed: Any integer.
        name: What the numbers are for, such as a parameter's fully qualified name.
    """
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def mix(key: Tensor, index: Tensor | int) -> Tensor:
    """Hash keys and indices to 64 uniform bits: splitmix64 seeded with `key`, draw `index` - 1.

    Args:
        key: int64, broadcastable with `index`.
        index: int64, or a Python integer.

    Returns:
        int64 of the broadcast shape.

    Source: Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators".
    """
    if isinstance(index, int):
        # Wrapped as tensors wrap: torch refuses constants beyond 64 bits.
        index = (index * _GOLDEN + (1 << 63)) % (1 << 64) - (1 << 63)
        value = key + index
    else:
        value = key + index * _GOLDEN
    value = (value ^ ((value >> 30) & ((1 << 34) - 1))) * _MIX_1
    value = (value ^ ((value >> 27) & ((1 << 37) - 1))) * _MIX_2
    return value ^ ((value >> 31) & ((1 << 33) - 1))


def uniform(key: Tensor, index: Tensor | int) -> Tensor:
    """Draw from [0, 1) with 24 random bits.

    Args:
        key: int64, broadcastable with `index`.
        index: int64, or a Python integer.

    Returns:
        float32 of the broadcast shape, each a multiple of 2^-24.
    """
    return ((mix(key, index) >> 40) & 0xFFFFFF).to(torch.float32) * 2.0**-24


def normal(
    key: int, shape: Sequence[int], region: Sequence[slice] | None = None, *, std: float = 1.0
) -> Tensor:
    """Draw a rectangular region of a tensor of independent normal numbers.

    The value of an element depends on `key`, `std` and its flat index in the whole tensor only.

    Args:
        key: From `key_of`.
        shape: Shape of the whole tensor.
        region: One slice of step 1 a dim, in elements; `None` is the whole tensor.
        std: Standard deviation.

    Returns:
        float32 on the CPU, of the region's shape.

    Raises:
        ValueError: If `region` has another number of dims than `shape` or a step.

    Source: Box and Muller 1958; elements 2i and 2i+1 share a pair of uniform numbers.
    """
    bounds = region_bounds(shape, region)
    sizes = [last - first for first, last in bounds]
    # Trailing dims that are whole, and the one before them, make runs of consecutive elements.
    outer = len(shape)
    while outer > 0:
        outer -= 1
        if bounds[outer] != (0, shape[outer]):
            break
    strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    starts = torch.zeros(1, dtype=torch.int64)
    for dim in range(outer):
        steps = torch.arange(*bounds[dim], dtype=torch.int64) * strides[dim]
        starts = (starts[:, None] + steps).flatten()
    if shape:
        starts += bounds[outer][0] * strides[outer]
    out = torch.empty(len(starts), math.prod(sizes[outer:]))
    if out.numel():
        _fill_runs(out, key, starts, std)
    return out.view(sizes)


def region_bounds(shape: Sequence[int], region: Sequence[slice] | None) -> list[tuple[int, int]]:
    """Turn slices into (first, last) pairs, `last` exclusive and never before `first`."""
    if region is None:
        return [(0, size) for size in shape]
    if len(region) != len(shape):
        raise ValueError(f"`region` must have {len(shape)} slices for shape {tuple(shape)}")
    bounds = []
    for size, part in zip(shape, region, strict=True):
        first, last, step = part.indices(size)
        if step != 1:
            raise ValueError(f"`region` must have step 1 in every dim, got {part}")
        bounds.append((first, max(first, last)))
    return bounds


def _fill_runs(out: Tensor, key: int, starts: Tensor, std: float) -> None:
    """Write into row i of `out` the normal numbers of flat indices from `starts[i]` on."""
    rows, run = out.shape
    threads = torch.get_num_threads()
    # One or two threads work as one: on a busy machine two wait for each other at every operation,
    # up to fifty times longer than the work takes.
    most = _PAIRS if threads <= 2 else _PAIRS * threads // 2
    pairs = min(most, rows * (run // 2 + 1))
    block = _Block(key, std, pairs, alone=threads <= 2)
    if run >= 2 * pairs:
        for row, start in zip(out, starts.tolist(), strict=True):
            # An odd start leaves the first pair half used; from there on pairs are whole.
            head = start % 2
            if head:
                block.fill(row[None, :1], torch.tensor([start]))
            for first in range(head, run, 2 * pairs):
                part = row[None, first : first + 2 * pairs]
                block.fill(part, torch.tensor([start + first]))
        return
    step = max(1, pairs // (run // 2 + 1))
    for first in range(0, rows, step):
        block.fill(out[first : first + step], starts[first : first + step])


class _Block:
    """Room for the intermediate results of some pairs of numbers, allocated once."""

    def __init__(self, key: int, std: float, pairs: int, *, alone: bool) -> None:
        self.key = key
        # The radius of a pair is sqrt(-2 ln u), times the standard deviation.
        self.factor = -2.0 * std * std
        self.steps = torch.arange(pairs + 1, dtype=torch.int64) * _GOLDEN
        self.bits, self.scratch = torch.empty(2, pairs + 1, dtype=torch.int64)
        self.radius, self.angle, self.wave = torch.empty(3, pairs + 1)
        self.both = torch.empty(2 * pairs + 2)
        size = _SPLIT - 1 if alone else pairs + 1
        self.parts = [
            (size * i, *parts)
            for i, parts in enumerate(
                zip(
                    self.radius.split(size),
                    self.angle.split(size),
                    self.wave.split(size),
                    strict=True,
                )
            )
        ]

    def fill(self, out: Tensor, starts: Tensor) -> None:
        """Write rows of consecutive numbers.

        Args:
            out: Shape (rows, run) with rows * (run // 2 + 1) at most the number of pairs + 1.
            starts: Flat index of each row's first number, shape (rows,).
        """
        rows, run = out.shape
        odd = starts % 2
        num_odd = int(odd.sum())
        exact = num_odd == 0 and run % 2 == 0
        pairs = run // 2 if exact else run // 2 + 1
        shape = (rows, pairs)
        bits = self.bits[: rows * pairs].view(shape)
        torch.add(((starts // 2) * _GOLDEN + self.key)[:, None], self.steps[:pairs], out=bits)
        self._scramble(bits, self.scratch[: rows * pairs].view(shape))
        target = out if exact else self.both[: 2 * rows * pairs].view(rows, 2 * pairs)
        self._box_muller(bits, target.unflatten(1, (pairs, 2)))
        if exact:
            return
        if num_odd == 0:
            out.copy_(target[:, :run])
        elif num_odd == rows:
            out.copy_(target[:, 1 : run + 1])
        else:
            torch.where(odd.bool()[:, None], target[:, 1 : run + 1], target[:, :run], out=out)

    def _scramble(self, bits: Tensor, scratch: Tensor) -> None:
        """Apply the output function of splitmix64 in place, as `mix` does."""
        for shift, factor in ((30, _MIX_1), (27, _MIX_2), (31, None)):
            torch.bitwise_right_shift(bits, shift, out=scratch)
            scratch.bitwise_and_((1 << (64 - shift)) - 1)
            bits.bitwise_xor_(scratch)
            if factor is not None:
                bits.mul_(factor)

    def _box_muller(self, bits: Tensor, out: Tensor) -> None:
        """Turn (rows, pairs) words, which are overwritten, into (rows, pairs, 2) numbers."""
        count, shape = bits.numel(), bits.shape
        radius, angle, wave = (
            each[:count].view(shape) for each in (self.radius, self.angle, self.wave)
        )
        scratch = self.scratch[:count].view(shape)
        # 24 high bits for the radius and 24 low ones for the angle: exact in float32.
        torch.bitwise_right_shift(bits, 40, out=scratch)
        radius.copy_(scratch.bitwise_and_(0xFFFFFF)).add_(0.5).mul_(2.0**-24)
        angle.copy_(bits.bitwise_and_(0xFFFFFF)).mul_(2.0**-24 * 2.0 * math.pi)
        used = [parts for parts in self.parts if parts[0] < count]
        for _, radii, angles, waves in used:
            radii.log_().mul_(self.factor).sqrt_()
            torch.cos(angles, out=waves)
            angles.sin_()
        torch.mul(wave, radius, out=out[..., 0])
        torch.mul(angle, radius, out=out[..., 1])
