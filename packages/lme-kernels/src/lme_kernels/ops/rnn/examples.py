"""Example calls of `rnn`."""

from collections.abc import Callable

import torch
from torch import Tensor

from lme_kernels.examples import Example


def examples(normal: Callable[..., Tensor]) -> list[Example]:
    """Make the calls; `normal(*shape)` draws standard normal numbers."""
    packed = torch.tensor([0, 0, 2, 2, 5, 5], dtype=torch.int32)
    return [
        Example("a few steps", (normal(2, 3, 2, 16), normal(2, 16, 16) * 0.3)),
        Example(
            "packed, some empty, from a state",
            (normal(5, 2, 8), normal(2, 8, 8) * 0.3),
            {"cu_seqlens": packed, "max_seqlen": 3, "initial_state": normal(5, 2, 8)},
        ),
        Example(
            "packed with 64 bits, matrices shared",
            (normal(5, 2, 9), normal(1, 9, 9) * 0.3),
            {"cu_seqlens": packed.long(), "gradient_clipping": 0.5},
        ),
        Example(
            "one input for all heads, bounded below",
            (normal(2, 3, 1, 5), normal(2, 5, 5) * 0.3),
            {"nonlinearity": "relu", "initial_state": normal(2, 2, 5)},
        ),
        Example("channels of a wider tensor", (normal(2, 2, 1, 24)[..., 8:], normal(1, 16, 16))),
        Example("no token", (normal(2, 0, 2, 16), normal(2, 16, 16)), constants=(0, 1)),
        Example("no sequence", (normal(0, 4, 2, 16), normal(2, 16, 16))),
    ]
