"""Example calls of `fused_linear_kl_div`."""

from collections.abc import Callable

from torch import Tensor

from lme_kernels.examples import Example


def examples(normal: Callable[..., Tensor]) -> list[Example]:
    """Make the calls; `normal(*shape)` draws standard normal numbers."""

    def labels(T: int) -> Tensor:
        chosen = normal(T).long()
        chosen[::3] = -100
        return chosen

    def call(T: int, H: int, V: int) -> tuple[Tensor, ...]:
        return normal(T, H) / 2, normal(V, H), normal(T, 8) / 2, normal(V, 8), labels(T)

    constants = (2, 3)
    jsd = {"direction": "jsd", "beta": 0.3}
    return [
        Example("student first", call(7, 16, 65), {"temperature": 1.5}, constants),
        Example("teacher first", call(7, 16, 65), {"direction": "teacher_student"}, constants),
        Example("mixture", call(7, 16, 65), jsd, constants),
        Example("by row", call(7, 16, 33), {"reduction": "none", **jsd}, constants),
        Example(
            "logits of the teacher",
            (normal(4, 16) / 2, normal(33, 16), normal(4, 33)),
            {"reduction": "sum"},
            (2,),
        ),
        Example("empty", call(0, 16, 20), {"reduction": "sum"}, constants),
    ]
