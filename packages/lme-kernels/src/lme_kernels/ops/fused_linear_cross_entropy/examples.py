"""Example calls of `fused_linear_cross_entropy`."""

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
        Example("mean", (normal(7, 16), normal(65, 16), labels(7, 65))),
        Example(
            "sum",
            (normal(7, 16), normal(65, 16), labels(7, 65)),
            {"reduction": "sum", **everything},
        ),
        Example(
            "by row",
            (normal(7, 16), normal(65, 16), labels(7, 65)),
            {"reduction": "none", **everything},
        ),
        Example(
            "gradient in the weight's dtype",
            (normal(9, 24), normal(33, 24), labels(9, 33)),
            {"grad_accum_dtype": None},
        ),
        Example(
            "all ignored",
            (normal(2, 16), normal(20, 16), labels(2, 20) * 0 - 100),
            {"reduction": "sum"},
        ),
        Example("empty", (normal(0, 16), normal(20, 16), labels(0, 20)), {"reduction": "sum"}),
    ]
