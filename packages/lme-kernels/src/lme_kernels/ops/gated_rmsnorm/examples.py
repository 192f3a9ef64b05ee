"""Example calls of `gated_rmsnorm`."""

from collections.abc import Callable

from torch import Tensor

from lme_kernels.examples import Example


def examples(normal: Callable[..., Tensor]) -> list[Example]:
    """Make the calls; `normal(*shape)` draws standard normal numbers."""
    return [
        Example("rows share a program", (normal(3, 5, 64), normal(3, 5, 64), normal(64))),
        Example(
            "normalised first",
            (normal(3, 5, 64), normal(3, 5, 64), normal(64)),
            {"norm_before_gate": True},
        ),
        Example("a row past a power of two", (normal(2, 1025), normal(2, 1025), normal(1025))),
        Example("no weight", (normal(7, 129), normal(7, 129), None)),
        Example(
            "no weight, normalised first",
            (normal(7, 129), normal(7, 129), None),
            {"norm_before_gate": True},
        ),
        Example("rows apart", (normal(6, 96)[:, :48], normal(6, 96)[:, 48:], normal(48))),
        Example("empty", (normal(0, 16), normal(0, 16), normal(16))),
    ]
