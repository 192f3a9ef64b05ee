"""Example calls of `mamba2_ssm`."""

from collections.abc import Callable

import torch
from torch import Tensor

from lme_kernels.examples import Example


def examples(normal: Callable[..., Tensor]) -> list[Example]:
    """Make the calls; `normal(*shape)` draws standard normal numbers."""
    packed = torch.tensor([0, 0, 5, 22, 22, 39, 39], dtype=torch.int32)

    def inputs(tokens: tuple[int, ...], N: int, P: int, G: int, n: int) -> tuple[Tensor, ...]:
        dt, A = normal(*tokens, N).sigmoid(), -normal(N).exp()
        return (
            normal(*tokens, N, P),
            dt,
            A,
            normal(*tokens, G, n),
            normal(*tokens, G, n),
        )

    return [
        Example(
            "past a chunk, groups, skip",
            inputs((2, 19), 2, 16, 1, 16),
            {"chunk_size": 16, "D": normal(2)},
        ),
        Example(
            "packed, some empty, from a state",
            inputs((39,), 2, 8, 2, 16),
            {
                "chunk_size": 16,
                "cu_seqlens": packed,
                "initial_state": normal(6, 2, 8, 16),
                "return_final_state": True,
            },
        ),
        Example("odd channels", inputs((1, 9), 1, 5, 1, 9), {"return_final_state": True}),
    ]
