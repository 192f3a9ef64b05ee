"""Example calls of `p_norm`."""

from collections.abc import Callable

from torch import Tensor

from lme_kernels.examples import Example


def examples(normal: Callable[..., Tensor]) -> list[Example]:
    """Make the calls; `normal(*shape)` draws standard normal numbers."""
    return [
        Example("rows share a program", (normal(3, 5, 64), normal(64))),
        Example("a row past a power of two", (normal(2, 1025), normal(1025)), {"p": 1.0}),
        Example("no weight, another order", (normal(7, 129), None), {"p": 3.0}),
        # Half of the rows have a norm below `eps`.
        Example("short rows", (normal(8, 16) * (normal(8, 1) > 0), normal(16)), {"eps": 0.5}),
        Example("rows apart", (normal(4, 6, 96)[..., :48], normal(48))),
        Example("empty", (normal(0, 16), normal(16))),
    ]
