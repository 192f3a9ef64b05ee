"""What is minimised: next-token prediction, the same on chosen tokens, or a teacher's output."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lme_core.training.args import TuningArgs
from lme_core.training.losses import IGNORED, nll_and_divergence
from lme_core.training.teacher_args import TeacherArgs

__all__ = [
    "OBJECTIVES",
    "Batch",
    "Distillation",
    "LossSum",
    "LossTerm",
    "NextToken",
    "Objective",
    "Outputs",
    "TeacherArgs",
    "build_objective",
]

Batch = Mapping[str, Tensor]


class Outputs(Protocol):
    """What a model returns."""

    @property
    def logits(self) -> Tensor | None:
        """Shape (B, S, V), where they were asked for."""
        ...

    @property
    def nll_sum(self) -> Tensor | None:
        """Negative log likelihood summed over the batch's targets, 0-d, where asked for."""
        ...

    @property
    def auxiliary(self) -> Mapping[str, Tensor]:
        """Further losses by name, 0-d, and statistics, of any shape: sums over the sequences."""
        ...


@dataclass(frozen=True, slots=True)
class LossTerm:
    """One further loss beside the first, as a sum."""

    total: Tensor
    """Sum over what `per` names, 0-d; of any shape where the weight is 0."""
    per: str = "targets"
    """Which count its mean divides by."""
    weight: float = 0.0
    """Coefficient of its mean in what is minimised; 0: only logged."""


@dataclass(frozen=True, slots=True)
class LossSum:
    """The losses of some batches, as sums: a runtime divides by global counts."""

    total: Tensor
    """Negative log likelihood summed over targets, in nats, 0-d, at least fp32."""
    targets: Tensor
    """Number of targets, 0-d int64."""
    extras: Mapping[str, LossTerm] = field(default_factory=dict)
    """Further losses by the name they are logged under."""


class Objective(Protocol):
    """What a run minimises: `total / targets + sum of weight * extra / its count`."""

    def counts(self, batch: Batch) -> Mapping[str, Tensor]:
        """Return what sums over this batch are divided by: `targets` and `sequences`, 0-d."""
        ...

    def forward(self, model: Any, batch: Batch) -> Any:
        """Run the model on one batch."""
        ...

    def loss(self, outputs: Any, batch: Batch) -> LossSum:
        """Sum the losses of one batch."""
        ...


def count_targets(batch: Batch) -> Mapping[str, Tensor]:
    """Count the targets and the sequences of a batch.

    Args:
        batch: With `labels`, shape (B, S), int64; -100 is no target. `sequences`, 0-d, says for how
            many its rows count, where that is not B: rows cut over devices count once.

    Returns:
        `targets` and `sequences`, 0-d int64 on the device of the labels.
    """
    labels = batch["labels"]
    targets = (labels != IGNORED).sum()
    sequences = batch.get("sequences")
    if sequences is None:
        sequences = torch.full_like(targets, labels.shape[0])
    return {"targets": targets, "sequences": sequences}


@dataclass(frozen=True, slots=True)
class NextToken:
    """Mean negative log likelihood of the labels: pretraining and finetuning.

    Which tokens are targets is in the labels; the data set marks the others with -100.
    """

    auxiliary_weights: Mapping[str, float] = field(default_factory=dict)
    """Coefficients of the model's auxiliary losses; those not named are only logged."""

    def counts(self, batch: Batch) -> Mapping[str, Tensor]:
        """Return the numbers of targets and sequences."""
        return count_targets(batch)

    def forward(self, model: Any, batch: Batch) -> Outputs:
        """Run the model without keeping logits."""
        return model(batch, logits=False)

    def loss(self, outputs: Outputs, batch: Batch) -> LossSum:
        """Take the model's own sums."""
        if outputs.nll_sum is None:
            raise ValueError("the model returned no `nll_sum` though called with `logits=False`")
        extras = auxiliary_terms(outputs, self.auxiliary_weights)
        return LossSum(outputs.nll_sum, count_targets(batch)["targets"], extras)


@dataclass(frozen=True, slots=True)
class Distillation:
    """The next-token loss plus the divergence from a teacher's distribution."""

    teacher: nn.Module
    """Called as the student is; it gets no gradient and is not saved."""
    args: TeacherArgs
    """Direction and weight of the divergence."""
    auxiliary_weights: Mapping[str, float] = field(default_factory=dict)
    """Coefficients of the student's auxiliary losses."""

    def __post_init__(self) -> None:
        self.teacher.requires_grad_(False).eval()

    def counts(self, batch: Batch) -> Mapping[str, Tensor]:
        """Return the numbers of targets and sequences."""
        return count_targets(batch)

    def forward(self, model: Any, batch: Batch) -> tuple[Outputs, Outputs]:
        """Run the student, and the teacher without dropout or gradient."""
        with torch.no_grad():
            plain = {name: value for name, value in batch.items() if name != "dropout_key"}
            teacher = self.teacher(plain, logits=True)
        return model(batch, logits=True), teacher

    def loss(self, outputs: tuple[Outputs, Outputs], batch: Batch) -> LossSum:
        """Sum both losses over the targets."""
        student, teacher = outputs
        if student.logits is None or teacher.logits is None:
            raise ValueError("distillation needs the logits of student and teacher")
        nll, divergence = nll_and_divergence(
            student.logits, teacher.logits, batch["labels"], method=self.args.kl_divergence_method
        )
        weight = self.args.kl_divergence_weight
        extras = auxiliary_terms(student, self.auxiliary_weights)
        extras = {**extras, "kl_divergence": LossTerm(divergence, "targets", weight)}
        return LossSum(nll, count_targets(batch)["targets"], extras)


def auxiliary_terms(outputs: Outputs, weights: Mapping[str, float]) -> dict[str, LossTerm]:
    """Turn a model's auxiliary losses into terms averaged over sequences.

    Args:
        outputs: Of the model.
        weights: Coefficients by name; 0 for those not named.

    Returns:
        One term per auxiliary loss.
    """
    return {
        name: LossTerm(total, "sequences", weights.get(name, 0.0))
        for name, total in outputs.auxiliary.items()
    }


def _next_token(
    auxiliary_weights: Mapping[str, float], args: TeacherArgs | None, teacher: nn.Module | None
) -> Objective:
    return NextToken(auxiliary_weights)


def _distillation(
    auxiliary_weights: Mapping[str, float], args: TeacherArgs | None, teacher: nn.Module | None
) -> Objective:
    if args is None or teacher is None:
        raise ValueError("`tuning_args.tuning_method: distillation` needs `teacher_args`")
    return Distillation(teacher, args, auxiliary_weights)


OBJECTIVES: Mapping[
    str, Callable[[Mapping[str, float], TeacherArgs | None, nn.Module | None], Objective]
] = {
    "pretraining": _next_token,
    "full_finetuning": _next_token,
    "distillation": _distillation,
}


def build_objective(
    args: TuningArgs,
    *,
    auxiliary_weights: Mapping[str, float] | None = None,
    teacher_args: TeacherArgs | None = None,
    teacher: nn.Module | None = None,
) -> Objective:
    """Build the objective of a run.

    Args:
        args: `tuning_args` of the run file.
        auxiliary_weights: Coefficients of the model's auxiliary losses by name.
        teacher_args: `teacher_args` of the run file; needed by distillation.
        teacher: The teacher, on the run's device and in its dtype; needed by distillation.

    Returns:
        The objective of `tuning_method`.

    Raises:
        ValueError: If distillation lacks its teacher.
    """
    build = OBJECTIVES[args.tuning_method]
    return build({} if auxiliary_weights is None else auxiliary_weights, teacher_args, teacher)
