"""Example calls of `swiglu_packed`."""

from collections.abc import Callable

from torch import Tensor

from lme_kernels.examples import Example


def examples(normal: Callable[..., Tensor]) -> list[Example]:
    """Make the calls; `normal(*shape)` draws standard normal numbers."""
    return [
        Example("interleaved", (normal(3, 5, 64),), {"layout": "interleaved"}),
        Example("concatenated", (normal(3, 5, 64),), {"layout": "concatenated"}),
        Example("interleaved, past a block", (normal(3, 2 * 1031),), {"layout": "interleaved"}),
        Example("concatenated, past a block", (normal(3, 2 * 1031),), {"layout": "concatenated"}),
        Example("rows apart", (normal(6, 96)[:, :48],), {"layout": "interleaved"}),
        Example("rows apart, concatenated", (normal(6, 96)[:, :48],), {"layout": "concatenated"}),
        Example("columns apart", (normal(6, 64)[:, ::2],), {"layout": "interleaved"}),
        Example("empty", (normal(0, 16),), {"layout": "interleaved"}),
    ]
