"""The run file's `teacher_args`: whom a distilled model learns from, and how."""

from dataclasses import dataclass
from typing import Literal

import torch

from lme_core.training.args import Precision, parse_dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherArgs:
    """The teacher of a distillation run."""

    model_name: str
    """Model directory or hub name of the teacher."""
    dtype: Precision = "fp32"
    """Type in which the teacher is held and computes."""
    kl_divergence_method: Literal["forward", "backward"]
    """forward: KL(student || teacher), which seeks the teacher's modes; backward: KL(teacher ||
    student), which covers all of its mass."""
    kl_divergence_weight: float = 1.0
    """Weight of the divergence beside the language modelling loss, whose weight is 1."""

    def __post_init__(self) -> None:
        parse_dtype("teacher_args.dtype", self.dtype)
        if self.kl_divergence_weight < 0:
            raise ValueError(
                "`teacher_args.kl_divergence_weight` must be at least 0, got "
                f"{self.kl_divergence_weight}"
            )

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of the teacher's parameters."""
        return parse_dtype("teacher_args.dtype", self.dtype)
