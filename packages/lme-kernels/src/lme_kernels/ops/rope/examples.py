"""Example calls of `rope`."""

from collections.abc import Callable

import torch
from torch import Tensor

from lme_kernels.examples import Example


def examples(normal: Callable[..., Tensor]) -> list[Example]:
    """Make the calls; `normal(*shape)` draws standard normal numbers."""

    def angles(*shape: int) -> tuple[Tensor, Tensor]:
        half = 3.0 * normal(*shape[:-1], shape[-1] // 2)
        both = torch.cat((half, half), dim=-1)
        return both.cos(), both.sin()

    return [
        Example(
            "all channels", (normal(2, 5, 4, 16), normal(2, 5, 2, 16), *angles(5, 16)), {}, (2, 3)
        ),
        Example(
            "last channels",
            (normal(2, 3, 6, 24), normal(2, 3, 3, 24), *angles(3, 10)),
            {"channels": "last"},
            (2, 3),
        ),
        Example(
            "first channels, positions by row",
            (normal(2, 3, 5, 24), normal(2, 3, 1, 24), *angles(2, 3, 8)),
            {"channels": "first"},
            (2, 3),
        ),
        Example(
            "heads of one tensor",
            (*normal(2, 5, 6, 16).split((4, 2), dim=2), *angles(5, 16)),
            {},
            (2, 3),
        ),
        Example(
            "channels apart",
            (normal(1, 4, 2, 32)[..., ::2], normal(1, 4, 2, 16), *angles(4, 16)),
            {},
            (2, 3),
        ),
        Example("empty", (normal(2, 0, 4, 16), normal(2, 0, 2, 16), *angles(0, 16)), {}, (2, 3)),
    ]
