"""Example calls of `linear_attention`."""

from collections.abc import Callable

import torch
from torch import Tensor

from lme_kernels.examples import Example


def examples(normal: Callable[..., Tensor]) -> list[Example]:
    """Make the calls; `normal(*shape)` draws standard normal numbers."""
    packed = torch.tensor([0, 0, 5, 22, 22, 39, 39], dtype=torch.int32)
    short = {"chunk_size": 16}
    return [
        Example(
            "decay a head, past a chunk",
            (normal(2, 19, 2, 16), normal(2, 19, 2, 16), normal(2, 19, 2, 16)),
            {**short, "log_decay": -normal(2, 19, 2).abs() * 0.2},
        ),
        Example(
            "no decay, odd channels, heads shared",
            (normal(1, 33, 2, 9), normal(1, 33, 1, 9), normal(1, 33, 2, 20)),
            {**short, "scale": 0.5, "return_final_state": True},
        ),
        Example(
            "packed, some empty, from a state",
            (normal(39, 1, 16), normal(39, 1, 16), normal(39, 2, 8)),
            {
                **short,
                "log_decay": -normal(39, 2).abs() * 0.2,
                "cu_seqlens": packed,
                "initial_state": normal(6, 2, 16, 8),
                "return_final_state": True,
            },
        ),
        Example(
            "packed with 64 bits, a token does not see itself",
            (normal(39, 1, 16), normal(39, 1, 16), normal(39, 1, 16)),
            {
                **short,
                "log_decay": -normal(39, 1).abs() * 0.2,
                "cu_seqlens": packed.long(),
                "inclusive": False,
            },
        ),
        Example(
            "channels of a wider tensor",
            normal(2, 5, 2, 48).split(16, -1),
            {**short, "return_final_state": True},
        ),
        Example(
            "decay a channel",
            (normal(1, 9, 1, 4), normal(1, 9, 1, 4), normal(1, 9, 1, 4)),
            {"log_decay": -normal(1, 9, 1, 4).abs() * 0.2},
        ),
        Example("no token", (normal(2, 0, 1, 16), normal(2, 0, 1, 16), normal(2, 0, 1, 16)), {}),
    ]
