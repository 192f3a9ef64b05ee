import pytest
import torch

from lme_core.training.args import TuningArgs
from lme_core.training.objectives import (
    OBJECTIVES,
    Distillation,
    NextToken,
    build_objective,
)
from lme_core.training.teacher_args import TeacherArgs

TEACHER = TeacherArgs(model_name="t", kl_divergence_method="forward")


def test_every_method_has_its_objective(tiny_model):
    built = {
        name: build_objective(
            TuningArgs(tuning_method=name),
            auxiliary_weights={"aux_loss": 0.5},
            teacher_args=TEACHER,
            teacher=tiny_model(),
        )
        for name in OBJECTIVES
    }
    assert isinstance(built["pretraining"], NextToken)
    assert isinstance(built["full_finetuning"], NextToken)
    assert isinstance(built["distillation"], Distillation)
    assert all(each.auxiliary_weights == {"aux_loss": 0.5} for each in built.values())


def test_distillation_needs_a_teacher():
    with pytest.raises(ValueError, match="distillation` needs `teacher_args`"):
        build_objective(TuningArgs(tuning_method="distillation"))


@pytest.mark.parametrize("objective", ["pretraining", "full_finetuning", "distillation"])
def test_counts_come_before_the_forward_pass_and_agree_with_the_sums(
    objective, tiny_model, counting_loader
):
    loader = counting_loader(ragged=True, batch_size=3)
    batch = [next(loader) for _ in range(3)][-1]
    built = build_objective(
        TuningArgs(tuning_method=objective), teacher_args=TEACHER, teacher=tiny_model(seed=1)
    )
    counts = built.counts(batch)
    sums = built.loss(built.forward(tiny_model(auxiliary=True), batch), batch)
    assert counts["targets"] == sums.targets == (batch["labels"] != -100).sum()
    assert counts["sequences"] == 3
    assert {term.per for term in sums.extras.values()} <= counts.keys()


def test_rows_that_count_elsewhere_say_so_in_the_batch(counting_loader):
    batch = {**next(counting_loader(batch_size=3)), "sequences": torch.tensor(0)}
    counts = build_objective(TuningArgs(tuning_method="pretraining")).counts(batch)
    assert counts["sequences"] == 0
    assert counts["targets"] == (batch["labels"] != -100).sum()


def test_the_teacher_sees_no_dropout(tiny_model, counting_loader):
    batch = {**next(counting_loader()), "dropout_key": torch.tensor(5)}
    teacher = tiny_model(dropout=True, seed=1)
    _, seen = Distillation(teacher, TEACHER).forward(tiny_model(dropout=True), batch)
    del batch["dropout_key"]
    assert torch.equal(seen.logits, teacher(batch, logits=True).logits)
    assert not seen.logits.requires_grad


def test_a_model_that_breaks_the_protocol_is_named(tiny_model, counting_loader):
    batch = next(counting_loader())
    with pytest.raises(ValueError, match="no `nll_sum`"):
        NextToken().loss(tiny_model()(batch, logits=True), batch)
