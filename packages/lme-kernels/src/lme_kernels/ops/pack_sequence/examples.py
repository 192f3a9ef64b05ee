"""Example calls of `pack_sequence`."""

from collections.abc import Callable

import torch
from torch import Tensor

from lme_kernels.examples import Example


def examples(normal: Callable[..., Tensor]) -> list[Example]:
    """Make the calls; `normal(*shape)` draws standard normal numbers."""
    offsets = torch.tensor([0, 7, 7, 8, 13, 13], dtype=torch.int32)
    left = {"padding_side": "left", "total_tokens": 13}
    right = {"padding_side": "right", "total_tokens": 13}
    wide = torch.tensor([0, 3, 5])
    return [
        Example("pads left, an empty sequence", (normal(5, 7, 2, 9), offsets), left),
        Example("pads right", (normal(5, 7, 2, 9), offsets), right),
        Example("one number a token", (normal(5, 7), offsets), right),
        Example("room for more tokens", (normal(5, 7, 4), offsets), {"total_tokens": 17}),
        Example("wider than a block", (normal(2, 3, 8201), wide), {"total_tokens": 5}),
        Example("rows apart", (normal(5, 9, 12)[:, 1:8, :6], offsets), left),
        Example("columns apart", (normal(5, 7, 12)[..., ::2], offsets), left),
        Example("total read from the offsets", (normal(5, 7, 3), offsets), {}),
        Example("no tokens", (normal(2, 3, 4), torch.zeros(3, dtype=torch.int32)), {}),
    ]
