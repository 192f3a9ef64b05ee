"""Example calls of `rmsnorm`."""

from collections.abc import Callable

from torch import Tensor

from lme_kernels.examples import Example


def examples(normal: Callable[..., Tensor]) -> list[Example]:
    """Make the calls; `normal(*shape)` draws standard normal numbers."""
    return [
        Example("rows share a program", (normal(3, 5, 64), normal(64)), {"eps": 1e-5}),
        Example("a row past a power of two", (normal(2, 4097), normal(4097)), {"eps": 1e-5}),
        Example("rows past a block, no weight", (normal(37, 129), None), {"eps": 1e-6}),
        # Its gradient is eps / (x^2 + eps)^1.5: nothing but rounding unless eps is large.
        Example("one element", (normal(1, 1), normal(1)), {"eps": 0.5}),
        Example("rows apart", (normal(4, 6, 96)[..., :48], normal(48)), {"eps": 1e-5}),
        Example("columns apart", (normal(6, 64)[:, ::2], normal(32)), {"eps": 1e-5}),
        Example("empty", (normal(0, 16), normal(16)), {"eps": 1e-5}),
    ]
