"""Example calls of `sort_by_expert`."""

from collections.abc import Callable

from torch import Tensor

from lme_kernels.examples import Example


def examples(normal: Callable[..., Tensor]) -> list[Example]:
    """Make the calls; `normal(*shape)` draws standard normal numbers."""
    experts = (normal(150, 4).abs() * 3).long().clamp(max=10)
    return [
        Example("experts without entries", (experts, 40)),
        Example("int32, more experts than entries", (experts[:3].int(), 100)),
        Example("columns apart", (experts[:, ::2], 11)),
        Example("experts out of range", (experts - 2, 5)),
        Example("one expert", (experts * 0, 1)),
        Example("empty", (experts[:0], 8)),
    ]
