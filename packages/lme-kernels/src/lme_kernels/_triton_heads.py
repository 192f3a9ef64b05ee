"""Rotation of heads in Triton: what `rope` and `qk_norm_rope` share."""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from lme_kernels.tuning import next_power_of_two


@triton.jit
def load_angles(cos_ptr, sin_ptr, token, S, angle_stride, R: tl.constexpr, BLOCK: tl.constexpr):
    """Load the angles of a token of a batch, halves apart, each of shape (1, BLOCK), in float32.

    `angle_stride` is the elements between rows of the batch, 0 where they share the angles.
    """
    half = tl.arange(0, BLOCK)[None, :]
    mask = half < R // 2
    start = (token // S) * angle_stride + (token % S) * R
    cos_1 = tl.load(cos_ptr + start + half, mask=mask, other=0.0).to(tl.float32)
    cos_2 = tl.load(cos_ptr + start + R // 2 + half, mask=mask, other=0.0).to(tl.float32)
    sin_1 = tl.load(sin_ptr + start + half, mask=mask, other=0.0).to(tl.float32)
    sin_2 = tl.load(sin_ptr + start + R // 2 + half, mask=mask, other=0.0).to(tl.float32)
    return cos_1, cos_2, sin_1, sin_2


@triton.jit
def rotate(first, second, cos_1, cos_2, sin_1, sin_2, BACKWARD: tl.constexpr):
    """Rotate halves of heads, or their gradients back."""
    if BACKWARD:
        turned_1 = first * cos_1 + second * sin_2
        turned_2 = second * cos_2 - first * sin_1
    else:
        turned_1 = first * cos_1 - second * sin_1
        turned_2 = second * cos_2 + first * sin_2
    return turned_1, turned_2


@dataclass(frozen=True, slots=True)
class HeadLayout:
    """Where the channels of heads are, and how a program holds them."""

    R: int
    """Channels that rotate."""
    D: int
    """Channels of a head."""
    rotated: int
    """First channel that rotates."""
    passing: int
    """First channel of those that do not."""
    block_half: int
    """Power of two that covers half of the rotating channels."""
    block_passing: int
    """Power of two that covers the others."""

    @classmethod
    def of(cls, R: int, D: int, channels: str) -> "HeadLayout":
        """Layout of heads of `D` channels of which the "last" or "first" `R` rotate."""
        last = channels == "last"
        return cls(
            R=R,
            D=D,
            rotated=D - R if last else 0,
            passing=0 if last else R,
            block_half=max(1, next_power_of_two(R // 2)),
            block_passing=next_power_of_two(D - R),
        )

    def block_heads(self, N: int) -> int:
        """Heads that a program holds at once: about 4096 numbers."""
        return max(1, min(next_power_of_two(N), 4096 // next_power_of_two(self.D)))


def head_strides(x: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
    """Return `x`, or a copy if its channels are apart, and its strides over batch, token and head.

    Args:
        x: Shape (B, S, heads, D).

    Returns:
        The tensor and three strides in elements.
    """
    if x.stride(-1) != 1:
        x = x.contiguous()
    return x, (x.stride(0), x.stride(1), x.stride(2))


def angle_stride(cos: Tensor) -> int:
    """Elements between the angles of two rows of a batch; 0 where they share them."""
    return 0 if cos.ndim == 2 else cos.stride(0)
