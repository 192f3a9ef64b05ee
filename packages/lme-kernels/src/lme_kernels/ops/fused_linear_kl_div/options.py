"""What the divergences from a teacher have in common."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from lme_kernels.ops.cross_entropy.options import check_reduction
from lme_kernels.ops.fused_linear_logprob.options import check_temperature

TeacherLogits = Callable[[slice], Tensor]
"""Takes rows and returns the teacher's logits for them, shape (n, V), any floating dtype."""

DIRECTIONS = ("student_teacher", "teacher_student", "jsd")
TAILS = ("bin", "renormalise", "ignore")


class DivergenceOptions(NamedTuple):
    """Options of a divergence, in the order its implementations take them."""

    direction: str
    beta: float
    temperature: float
    reduction: str
    ignore_index: int
    tail: str = "ignore"
    provider: TeacherLogits | None = None

    def check(self) -> "DivergenceOptions":
        """Return itself if every option is in range.

        Raises:
            ValueError: If one is not.
        """
        check_reduction(self.reduction)
        check_temperature(self.temperature)
        if self.direction not in DIRECTIONS:
            raise ValueError(
                '`direction` must be "student_teacher", which is KL(student || teacher) and the '
                'run file\'s `forward`, "teacher_student", which is KL(teacher || student) and '
                f'its `backward`, or "jsd", got {self.direction!r}'
            )
        if not 0.0 < self.beta < 1.0:
            raise ValueError(
                f"`beta` must be between 0 and 1, both excluded, got {self.beta}; at the ends the "
                "divergence is 0: use another `direction`"
            )
        if self.tail not in TAILS:
            raise ValueError(f'`tail` must be "bin", "renormalise" or "ignore", got {self.tail!r}')
        return self
