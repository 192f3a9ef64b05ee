"""Example calls of `lstm`."""

from collections.abc import Callable

import torch
from torch import Tensor

from lme_kernels.examples import Example


def examples(normal: Callable[..., Tensor]) -> list[Example]:
    """Make the calls; `normal(*shape)` draws standard normal numbers."""

    def tensors(tokens: tuple[int, ...], heads: tuple[int, ...], D: int) -> tuple[Tensor, ...]:
        """Inputs and matrices with the numbers of heads that are given, in the op's order."""
        pairs = zip(heads[::2], heads[1::2], strict=True)
        both = ((normal(*tokens, n, D), normal(m, D, D) * 0.3) for n, m in pairs)
        return tuple(each for pair in both for each in pair)

    packed = torch.tensor([0, 0, 2, 2, 5, 5], dtype=torch.int32)
    return [
        Example("a few steps", tensors((2, 2), (2,) * 8, 16)),
        Example(
            "packed, some empty, from a state",
            tensors((5,), (1,) * 8, 9),
            {
                "cu_seqlens": packed,
                "initial_state": normal(5, 1, 9),
                "initial_cell": normal(5, 1, 9),
            },
        ),
        Example(
            "heads shared, gradients clipped",
            tensors((1, 3), (1, 2, 4, 1, 2, 4, 1, 2), 8),
            {"gradient_clipping": 0.3},
        ),
        Example("no sequence", tensors((0, 4), (2,) * 8, 16)),
    ]
