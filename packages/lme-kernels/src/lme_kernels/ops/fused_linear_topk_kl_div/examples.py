"""Example calls of `fused_linear_topk_kl_div`."""

from collections.abc import Callable

from torch import Tensor

from lme_kernels.examples import Example


def examples(normal: Callable[..., Tensor]) -> list[Example]:
    """Make the calls; `normal(*shape)` draws standard normal numbers."""

    def call(T: int, H: int, V: int, K: int) -> tuple[Tensor, ...]:
        log_q, idx = normal(T, V).log_softmax(dim=-1).topk(K, dim=-1)
        # An entry that is not there, of a class that another entry has.
        log_q[:1, -1] = -float("inf")
        idx[:1, -1] = idx[:1, 0]
        labels = normal(T).long()
        labels[1::3] = -100
        return normal(T, H) / 2, normal(V, H), idx, log_q, labels

    constants = (3,)
    teacher_first = {"direction": "teacher_student"}
    return [
        Example("bin", call(7, 16, 65, 5), {"temperature": 1.5}, constants),
        Example("bin, teacher first", call(7, 16, 65, 5), teacher_first, constants),
        Example("bin, mixture", call(4, 16, 33, 3), {"direction": "jsd", "beta": 0.3}, constants),
        Example(
            "renormalise",
            call(7, 16, 65, 5),
            {"tail": "renormalise", "reduction": "none"},
            constants,
        ),
        Example("ignore", call(7, 16, 65, 5), {"tail": "ignore", **teacher_first}, constants),
        Example("empty", call(0, 16, 20, 2), {"reduction": "sum"}, constants),
    ]
