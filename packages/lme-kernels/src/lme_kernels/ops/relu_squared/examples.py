"""Example calls of `relu_squared`."""

from collections.abc import Callable

from torch import Tensor

from lme_kernels.examples import Example


def examples(normal: Callable[..., Tensor]) -> list[Example]:
    """Make the calls; `normal(*shape)` draws standard normal numbers."""
    return [
        Example("one block", (normal(3, 5, 64),)),
        Example("past a block", (normal(5, 1031),)),
        Example("rows apart", (normal(6, 96)[:, :48],)),
        Example("one number", (normal(1),)),
        Example("empty", (normal(0, 16),)),
    ]
