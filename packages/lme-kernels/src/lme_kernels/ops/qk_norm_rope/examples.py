"""Example calls of `qk_norm_rope`."""

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
            "all channels",
            (normal(2, 2, 4, 16), normal(2, 2, 2, 16), normal(16), normal(16), *angles(2, 16)),
            {},
            (4, 5),
        ),
        Example(
            "last channels",
            (normal(1, 3, 6, 24), normal(1, 3, 3, 24), normal(24), normal(24), *angles(3, 10)),
            {"channels": "last", "eps": 1e-5},
            (4, 5),
        ),
        Example(
            "first channels, positions by row",
            (normal(2, 2, 5, 24), normal(2, 2, 1, 24), normal(24), normal(24), *angles(2, 2, 8)),
            {"channels": "first"},
            (4, 5),
        ),
        Example(
            "no weights",
            (normal(1, 3, 2, 16), normal(1, 3, 2, 16), None, None, *angles(3, 16)),
            {},
            (4, 5),
        ),
        Example(
            "heads of one tensor",
            (
                *normal(1, 3, 6, 16).split((4, 2), dim=2),
                normal(16),
                normal(16),
                *angles(3, 16),
            ),
            {},
            (4, 5),
        ),
        Example(
            "empty",
            (normal(2, 0, 4, 16), normal(2, 0, 2, 16), normal(16), normal(16), *angles(0, 16)),
            {},
            (4, 5),
        ),
    ]
