"""Example calls of `router_topk`."""

from collections.abc import Callable

from torch import Tensor

from lme_kernels.examples import Example


def examples(normal: Callable[..., Tensor]) -> list[Example]:
    """Make the calls; `normal(*shape)` draws standard normal numbers."""
    bias = normal(9)
    return [
        Example("softmax of the chosen", (normal(3, 21, 9), 3)),
        Example("softmax of all", (normal(63, 9), 3), {"normalize": False}),
        Example("sigmoid", (normal(63, 9), 2), {"score": "sigmoid", "normalize": False}),
        Example("normalised sigmoid", (normal(63, 9), 2), {"score": "sigmoid"}),
        Example("bias", (normal(63, 9), 4), {"score": "sigmoid", "bias": bias}),
        Example("bias of shares", (normal(63, 9), 4), {"normalize": False, "bias": bias}),
        Example("all experts", (normal(5, 8), 8)),
        Example("one expert", (normal(5, 130), 1), {"normalize": False}),
        Example("columns apart", (normal(5, 32)[:, ::2], 2)),
        Example("empty", (normal(0, 8), 2)),
    ]
