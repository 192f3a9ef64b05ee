"""Example calls of `continuous_count`."""

from collections.abc import Callable

from torch import Tensor

from lme_kernels.examples import Example


def examples(normal: Callable[..., Tensor]) -> list[Example]:
    """Make the calls; `normal(*shape)` draws standard normal numbers."""
    values = (normal(40, 30) * 8).long()
    return [
        Example("negative and large values", (values, 7)),
        Example("int32, past a block of bins", (values.int(), 67)),
        Example("bins beyond a program", (values, 777)),
        Example("columns apart", (values[:, ::3], 16)),
        Example("one bin", (values[0], 1)),
        Example("empty", (values[:0], 5)),
    ]
