"""Example calls of `softmax`."""

from collections.abc import Callable

from torch import Tensor

from lme_kernels.examples import Example


def examples(normal: Callable[..., Tensor]) -> list[Example]:
    """Make the calls; `normal(*shape)` draws standard normal numbers."""
    hidden = normal(5, 65)
    hidden[:, ::3] = float("-inf")
    return [
        Example("rows share a program", (normal(3, 5, 64),), {"scale": 0.5}),
        Example("a row past a power of two", (normal(2, 1025),)),
        Example("bounded", (normal(7, 129) * 10,), {"softcap": 5.0}),
        Example("wider than a block", (normal(2, 33000),)),
        Example("wider than a block, bounded", (normal(1, 32769) * 10,), {"softcap": 5.0}),
        Example("hidden classes", (hidden,)),
        Example("large scores", (normal(4, 32) * 1000,)),
        Example("rows apart", (normal(4, 6, 96)[..., :48],)),
        Example("empty", (normal(0, 16),)),
    ]
