"""Example calls of `causal_conv1d`."""

from collections.abc import Callable

import torch
from torch import Tensor

from lme_kernels.examples import Example


def examples(normal: Callable[..., Tensor]) -> list[Example]:
    """Make the calls; `normal(*shape)` draws standard normal numbers."""
    packed = torch.tensor([0, 0, 3, 5, 5, 17, 17], dtype=torch.int32)
    silu = {"activation": "silu"}
    return [
        Example("four taps, bias, silu", (normal(2, 9, 24), normal(24, 4), normal(24)), silu),
        Example(
            "packed, some empty or short, from a state",
            (normal(17, 24), normal(24, 4), normal(24)),
            {
                **silu,
                "cu_seqlens": packed,
                "initial_state": normal(6, 24, 3),
                "return_final_state": True,
            },
        ),
        Example(
            "packed with 64 bits", (normal(17, 9), normal(9, 3)), {"cu_seqlens": packed.long()}
        ),
        Example(
            "rows shorter than the taps, from a state",
            (normal(3, 2, 8), normal(8, 4)),
            {"initial_state": normal(3, 8, 3), "return_final_state": True},
        ),
        Example("channels of a wider tensor", (normal(2, 5, 48)[..., 8:40], normal(32, 2)), silu),
        Example("one tap", (normal(2, 5, 8), normal(8, 1)), silu),
        Example("no token", (normal(2, 0, 8), normal(8, 4), normal(8)), silu),
    ]
