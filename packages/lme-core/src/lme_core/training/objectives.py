"""What is minimised: next-token prediction, the same on chosen tokens, or a teacher's output."""

from lme_core.training.teacher_args import TeacherArgs

__all__ = ["TeacherArgs"]
