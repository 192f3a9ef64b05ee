"""Example calls of `fused_linear_logprob`."""

from collections.abc import Callable

from torch import Tensor

from lme_kernels.examples import Example


def examples(normal: Callable[..., Tensor]) -> list[Example]:
    """Make the calls; `normal(*shape)` draws standard normal numbers."""

    def labels(T: int, V: int) -> Tensor:
        chosen = (normal(T).abs() * V).long() % V
        chosen[::3] = -100
        return chosen

    def call(T: int, H: int, V: int) -> tuple[Tensor, Tensor, Tensor]:
        return normal(T, H), normal(V, H), labels(T, V)

    return [
        Example("plain", call(7, 16, 65)),
        Example("entropy", call(7, 16, 65), {"return_entropy": True, "temperature": 1.7}),
        Example("gradient in the weight's dtype", call(5, 24, 33), {"grad_accum_dtype": None}),
        Example("empty", call(0, 16, 20), {"return_entropy": True}),
    ]
