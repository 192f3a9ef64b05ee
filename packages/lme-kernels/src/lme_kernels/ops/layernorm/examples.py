"""Example calls of `layernorm`."""

from collections.abc import Callable

from torch import Tensor

from lme_kernels.examples import Example


def examples(normal: Callable[..., Tensor]) -> list[Example]:
    """Make the calls; `normal(*shape)` draws standard normal numbers."""
    return [
        Example("rows share a program", (normal(3, 5, 64), normal(64), normal(64))),
        # A mean far from zero: the variance is taken of centred numbers.
        Example("a row past a power of two", (normal(2, 1025) + 30, normal(1025), normal(1025))),
        Example("no bias", (normal(7, 129), normal(129), None)),
        Example("no weight", (normal(7, 33), None, normal(33))),
        Example("neither", (normal(9, 48), None, None), {"eps": 0.1}),
        Example("rows apart", (normal(4, 6, 96)[..., :48], normal(48), normal(48))),
        Example("empty", (normal(0, 16), normal(16), normal(16))),
    ]
