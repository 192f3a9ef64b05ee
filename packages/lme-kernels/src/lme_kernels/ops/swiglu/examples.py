"""Example calls of `swiglu`."""

from collections.abc import Callable

from torch import Tensor

from lme_kernels.examples import Example


def examples(normal: Callable[..., Tensor]) -> list[Example]:
    """Make the calls; `normal(*shape)` draws standard normal numbers."""
    packed = normal(6, 96)
    return [
        Example("one block", (normal(3, 5, 64), normal(3, 5, 64))),
        Example("past a block", (normal(5, 1031), normal(5, 1031))),
        Example("halves of one tensor", (packed[:, :48], packed[:, 48:])),
        Example("columns apart", (normal(6, 64)[:, ::2], normal(6, 32))),
        Example("one number", (normal(1), normal(1))),
        Example("empty", (normal(0, 16), normal(0, 16))),
    ]
