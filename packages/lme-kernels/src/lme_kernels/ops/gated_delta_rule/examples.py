"""Example calls of `gated_delta_rule`."""

from collections.abc import Callable

import torch
from torch import Tensor

from lme_kernels.examples import Example


def examples(normal: Callable[..., Tensor]) -> list[Example]:
    """Make the calls; `normal(*shape)` draws standard normal numbers."""
    packed = torch.tensor([0, 0, 5, 22, 22, 39, 39], dtype=torch.int32)

    def gates(*shape: int) -> tuple[Tensor, Tensor]:
        return -normal(*shape).abs() * 0.2, normal(*shape).sigmoid()

    return [
        Example(
            "past a chunk",
            (normal(2, 19, 2, 16), normal(2, 19, 2, 16), normal(2, 19, 2, 16), *gates(2, 19, 2)),
            {"chunk_size": 16},
        ),
        Example(
            "packed, some empty, from a state",
            (normal(39, 1, 16), normal(39, 1, 16), normal(39, 2, 8), *gates(39, 2)),
            {
                "chunk_size": 16,
                "cu_seqlens": packed,
                "initial_state": normal(6, 2, 16, 8),
                "return_final_state": True,
            },
        ),
        Example(
            "queries and keys as they are",
            (normal(1, 9, 1, 9), normal(1, 9, 1, 9) * 0.3, normal(1, 9, 1, 5), *gates(1, 9, 1)),
            {"l2_normalize": False, "scale": 1.0, "return_final_state": True},
        ),
    ]
