"""Example calls of `attention`."""

from collections.abc import Callable

import torch
from torch import Tensor

from lme_kernels.examples import Example


def examples(normal: Callable[..., Tensor]) -> list[Example]:
    """Make the calls; `normal(*shape)` draws standard normal numbers."""

    def qkv(B: int, S: int, T: int, N: int, K: int, D: int) -> tuple[Tensor, Tensor, Tensor]:
        return normal(B, S, N, D), normal(B, T, K, D), normal(B, T, K, D)

    documents = torch.tensor([0, 4, 9, 9, 12, 18], dtype=torch.int32)
    return [
        Example("causal, shared key heads", qkv(2, 9, 9, 4, 2, 16)),
        Example("not causal", qkv(2, 9, 7, 2, 2, 16), {"causal": False}),
        Example("last queries", qkv(2, 3, 9, 4, 2, 16)),
        Example("one query", qkv(2, 1, 9, 4, 2, 16)),
        Example("window", qkv(2, 9, 9, 4, 2, 16), {"window": 3}),
        Example("documents", qkv(2, 9, 9, 4, 2, 16), {"cu_seqlens": documents}),
        Example("added mask", qkv(2, 9, 9, 4, 2, 16), {"mask": normal(2, 1, 9, 9), "scale": 0.3}),
        Example("bounded", qkv(2, 9, 9, 4, 2, 16), {"softcap": 2.0}),
        Example("sinks", qkv(2, 9, 9, 4, 2, 16), {"sinks": normal(4)}),
        Example("empty", qkv(2, 0, 0, 4, 2, 16)),
    ]
