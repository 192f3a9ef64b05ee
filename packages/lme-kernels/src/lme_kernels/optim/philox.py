"""Random bits that are a function of where they are used: Philox in plain torch."""

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF

# Elements that take the same word of consecutive counters; what kernels do at once.
BLOCK = 2048


def philox(seed: int, counters: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Ten rounds of Philox with four words of 32 bits.

    Args:
        seed: Key of 64 bits.
        counters: Four int64 tensors of one shape, each below 2^32.

    Returns:
        Four int64 tensors of numbers below 2^32.

    Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
    """
    key = (seed & _WORD, (seed >> 32) & _WORD)
    c0, c1, c2, c3 = counters
    for _ in range(10):
        high_0, low_0 = _multiply(c0, _MULTIPLIERS[0])
        high_2, low_2 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high_2 ^ c1 ^ key[0], low_2, high_0 ^ c3 ^ key[1], low_0
        key = ((key[0] + _WEYL[0]) & _WORD, (key[1] + _WEYL[1]) & _WORD)
    return c0, c1, c2, c3


def element_bits(
    size: int, *, seed: int, parameter: int, step: int, device: torch.device
) -> Tensor:
    """Draw 32 bits for each element of a parameter at one step.

    Args:
        size: Number of elements.
        seed: Key of 64 bits.
        parameter: Number of the parameter.
        step: Number of the step.
        device: Where to draw.

    Returns:
        int64, shape (size,), below 2^32; equal for equal arguments on every device.
    """
    element = torch.arange(size, device=device)
    counter = element // (4 * BLOCK) * BLOCK + element % BLOCK
    low, high = counter & _WORD, counter >> 32
    words = philox(seed, (low, high, torch.full_like(low, parameter), torch.full_like(low, step)))
    which = element // BLOCK % 4
    return torch.stack(words).gather(0, which[None]).squeeze(0)


def round_stochastically(values: Tensor, bits: Tensor) -> Tensor:
    """Round float32 to bfloat16, up as often as the value is close to the upper neighbour.

    Args:
        values: float32, any shape.
        bits: Random integers, as many; the lowest 16 bits of each decide.

    Returns:
        bfloat16, shape of `values`; what is not finite stays what it is.
    """
    word = values.contiguous().view(torch.int32)
    moved = (word + (bits.reshape(word.shape) & 0xFFFF).to(torch.int32)) & -0x10000
    rounded = moved.view(torch.float32).to(torch.bfloat16)
    return torch.where(values.isfinite(), rounded, values.to(torch.bfloat16))


def _multiply(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a product of 32-bit numbers, in halves that int64 holds."""
    low_half, high_half = b & 0xFFFF, b >> 16
    low = a * low_half
    middle = a * high_half + (low >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)
