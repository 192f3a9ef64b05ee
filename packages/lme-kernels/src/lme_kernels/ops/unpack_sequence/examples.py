"""Example calls of `unpack_sequence`."""

from collections.abc import Callable

import torch
from torch import Tensor

from lme_kernels.examples import Example


def examples(normal: Callable[..., Tensor]) -> list[Example]:
    """Make the calls; `normal(*shape)` draws standard normal numbers."""
    offsets = torch.tensor([0, 7, 7, 8, 13, 13], dtype=torch.int32)
    left = {"batch_size": 5, "max_seqlen": 7, "padding_side": "left"}
    right = {**left, "padding_side": "right"}
    none = {**left, "batch_size": 2}
    return [
        Example("pads left, an empty sequence", (normal(13, 2, 9), offsets), left),
        Example("pads right", (normal(13, 2, 9), offsets), right),
        Example("pads of another value", (normal(13), offsets), {**left, "pad_value": -1.5}),
        Example("tokens past the last sequence", (normal(15, 4), offsets), left),
        Example("longer rows than sequences", (normal(13, 4), offsets), {**right, "max_seqlen": 9}),
        Example("wider than a block", (normal(13, 8201), offsets), right),
        Example("tokens apart", (normal(13, 12)[:, :6], offsets), left),
        Example("columns apart", (normal(13, 12)[:, ::2], offsets), left),
        Example("no tokens", (normal(0, 4), torch.zeros(3, dtype=torch.int32)), none),
    ]
