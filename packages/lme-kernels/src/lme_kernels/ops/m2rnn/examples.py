"""Example calls of `m2rnn`."""

from collections.abc import Callable

import torch
from torch import Tensor

from lme_kernels.examples import Example


def examples(normal: Callable[..., Tensor]) -> list[Example]:
    """Make the calls; `normal(*shape)` draws standard normal numbers."""

    def tensors(tokens: tuple[int, ...], heads: tuple[int, ...], K: int, V: int) -> tuple:
        """Query, key, value, weight and forget with the numbers of heads that are given."""
        q, k, v, w, f = heads
        return (
            normal(*tokens, q, K),
            normal(*tokens, k, K) * 0.5,
            normal(*tokens, v, V),
            normal(w, V, V) * 0.3,
            normal(*tokens, f).sigmoid(),
        )

    packed = torch.tensor([0, 0, 2, 2, 5, 5], dtype=torch.int32)
    return [
        Example("a few steps", tensors((2, 2), (2,) * 5, 16, 16)),
        Example(
            "packed, some empty, from a state",
            tensors((5,), (1,) * 5, 9, 5),
            {"cu_seqlens": packed, "initial_state": normal(5, 1, 9, 5)},
        ),
        Example(
            "heads shared, gradients clipped",
            tensors((1, 3), (1, 1, 2, 4, 2), 8, 16),
            {"gradient_clipping": 0.3},
        ),
        Example("past a kept state", tensors((1, 35), (1,) * 5, 4, 4)),
        Example("no sequence", tensors((0, 4), (2,) * 5, 16, 16)),
    ]
