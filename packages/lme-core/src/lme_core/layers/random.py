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
_BLOCK = 131072


def key_of(seed: int, name: str) -> int:
    """Hash a seed and a name to a key, a signed 64-bit integer.

    Args:
        seed: Any integer.
        name: What the numbers are for, such as a parameter's fully qualified name.
    """
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def hash_(counter: Tensor) -> Tensor:
    """Scramble 64-bit counters in place: the output function of splitmix64.

    Args:
        counter: int64, any shape; overwritten.

    Returns:
        `counter`, whose bits are now uniform.

    Source: Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators".
    """
    scratch = counter.bitwise_right_shift(30).bitwise_and_((1 << 34) - 1)
    counter.bitwise_xor_(scratch).mul_(_MIX_1)
    torch.bitwise_right_shift(counter, 27, out=scratch).bitwise_and_((1 << 37) - 1)
    counter.bitwise_xor_(scratch).mul_(_MIX_2)
    torch.bitwise_right_shift(counter, 31, out=scratch).bitwise_and_((1 << 33) - 1)
    return counter.bitwise_xor_(scratch)


def mix(key: Tensor, index: Tensor | int) -> Tensor:
    """Hash keys and indices to uniform int64 numbers, differentiable by nobody, traceable.

    Args:
        key: int64, broadcastable with `index`.
        index: int64, or a Python integer.

    Returns:
        int64 of the broadcast shape.
    """
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
    # Trailing dims that are whole make runs of consecutive elements.
    run, outer = 1, len(shape)
    while outer > 0 and (run == 1 or bounds[outer] == (0, shape[outer])):
        outer -= 1
        run *= bounds[outer][1] - bounds[outer][0]
        if bounds[outer] != (0, shape[outer]):
            break
    starts = torch.zeros(1, dtype=torch.int64)
    stride = math.prod(shape)
    for dim, (first, last) in enumerate(bounds):
        stride //= max(shape[dim], 1)
        steps = torch.arange(first, last if dim < outer else first + 1, dtype=torch.int64)
        starts = (starts[:, None] + steps * stride).flatten()
    values = _runs(key, starts, run) if run else torch.empty(0)
    return values.mul_(std).view([last - first for first, last in bounds])


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


def _runs(key: int, starts: Tensor, run: int) -> Tensor:
    """Normal numbers of runs of `run` consecutive elements, shape (len(starts), run)."""
    out = torch.empty(len(starts), run)
    if len(starts) == 1:
        # One long run: blocks that stay in the cache.
        start = int(starts)
        for first in range(0, run, _BLOCK):
            size = min(_BLOCK, run - first)
            out[0, first : first + size] = _short_runs(
                key, starts.new_tensor([start + first]), size
            )
        return out
    rows = max(1, _BLOCK // run)
    for first in range(0, len(starts), rows):
        part = starts[first : first + rows]
        if run <= _BLOCK:
            out[first : first + rows] = _short_runs(key, part, run)
        else:
            out[first] = _runs(key, part, run)[0]
    return out


def _short_runs(key: int, starts: Tensor, run: int) -> Tensor:
    first_pair = starts >> 1
    odd = (starts & 1).bool()
    pairs = torch.arange(run // 2 + 1, dtype=torch.int64)
    bits = hash_((first_pair[:, None] + pairs).mul_(_GOLDEN).add_(key))
    # The high half gives the radius and the low half the angle; both are exact in float32.
    radius = (bits >> 40).bitwise_and_(0xFFFFFF).to(torch.float32)
    radius = radius.add_(0.5).mul_(2.0**-24).log_().mul_(-2.0).sqrt_()
    angle = bits.bitwise_and_(0xFFFFFF).to(torch.float32).mul_(2.0**-24 * 2.0 * math.pi)
    both = torch.empty(*angle.shape, 2)
    torch.mul(angle.cos(), radius, out=both[..., 0])
    torch.mul(angle.sin_(), radius, out=both[..., 1])
    flat = both.flatten(1)
    if not odd.any():
        return flat[:, :run]
    if odd.all():
        return flat[:, 1 : run + 1]
    return torch.where(odd[:, None], flat[:, 1 : run + 1], flat[:, :run])
