"""Example calls of `cross_entropy`."""

from collections.abc import Callable

from torch import Tensor

from lme_kernels.examples import Example


def examples(normal: Callable[..., Tensor]) -> list[Example]:
    """Make the calls; `normal(*shape)` draws standard normal numbers."""

    def labels(T: int, V: int) -> Tensor:
        chosen = (normal(T).abs() * V).long() % V
        chosen[::3] = -100
        return chosen

    everything = {"label_smoothing": 0.1, "z_loss": 0.01, "softcap": 4.0, "logit_scale": 0.7}

    return [
        Example("mean", (normal(7, 65) * 3, labels(7, 65))),
        Example("sum", (normal(7, 65) * 3, labels(7, 65)), {"reduction": "sum", **everything}),
        Example("by row", (normal(7, 65) * 3, labels(7, 65)), {"reduction": "none", **everything}),
        Example("two dimensions", (normal(2, 3, 33), labels(6, 33).view(2, 3))),
        Example("past a power of two", (normal(3, 1025), labels(3, 1025)), {"z_loss": 0.1}),
        Example(
            "all ignored",
            (normal(2, 16), labels(2, 16) * 0 - 100),
            {"reduction": "sum"},
        ),
        Example("empty", (normal(0, 16), labels(0, 16)), {"reduction": "sum"}),
    ]
