import pytest
from hypothesis import given
from hypothesis import strategies as st

from lme_core.training.args import TrainingParameters
from lme_core.training.batch_plan import BatchPlan

sizes = st.integers(1, 64)


def parameters(**settings):
    return TrainingParameters(num_training_steps=1, **settings)


@given(micro=sizes, accumulation=sizes, replicas=sizes, left_out=st.integers(0, 3))
def test_any_two_sizes_give_the_third(micro, accumulation, replicas, left_out):
    total = micro * accumulation * replicas
    settings = {
        "micro_batch_size": micro,
        "gradient_accumulation_steps": accumulation,
        "global_batch_size": total,
    }
    names = list(settings)
    if left_out < 3:
        del settings[names[left_out]]
    plan = BatchPlan.resolve(parameters(**settings), replicas)
    assert plan == BatchPlan(
        micro_batch_size=micro,
        gradient_accumulation_steps=accumulation,
        global_batch_size=total,
        num_replicas=replicas,
    )


@given(micro=sizes, replicas=sizes)
def test_a_micro_batch_size_alone_means_no_accumulation(micro, replicas):
    plan = BatchPlan.resolve(parameters(micro_batch_size=micro), replicas)
    assert (plan.gradient_accumulation_steps, plan.global_batch_size) == (1, micro * replicas)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"micro_batch_size": 3, "global_batch_size": 16},
            "multiple of `micro_batch_size` 3 \\* 2 replicas = 6.*nearest global sizes are 12 or 18",
        ),
        (
            {"gradient_accumulation_steps": 16, "global_batch_size": 16},
            "nearest global sizes are 32",
        ),
        (
            {
                "micro_batch_size": 3,
                "gradient_accumulation_steps": 4,
                "global_batch_size": 12,
            },
            "is 12, but `micro_batch_size` 3 \\* `gradient_accumulation_steps` 4 \\* 2",
        ),
    ],
)
def test_contradictions_name_the_sizes_and_ones_that_work(settings, message):
    with pytest.raises(ValueError, match=message):
        BatchPlan.resolve(parameters(**settings), 2)
