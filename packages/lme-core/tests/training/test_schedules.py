import json

import pytest
import torch

from lme_core.training.args import NoEffectWarning
from lme_core.training.schedules import (
    DECAYS,
    ExtraLRSchedulerArgs,
    LRSchedulerArgs,
    build_schedule,
)

STEPS = [0, 1, 4, 5, 6, 7, 11, 16, 17, 20]
# Factors at STEPS for warmup 4, constant 2, decay 10, final factor 0.1, as the system whose run
# files we read computes them (six digits); its exponential decay falls on past its end, ours stays.
GOLDEN = {
    "cosine": [0, 0.25, 1, 1, 1, 0.977975, 0.55, 0.1, 0.1, 0.1],
    "linear": [0, 0.25, 1, 1, 1, 0.91, 0.55, 0.1, 0.1, 0.1],
    "exponential": [0, 0.25, 1, 1, 1, 0.86451, 0.439787, 0.1, 0.1, 0.1],
    "constant": [0, 0.25, 1, 1, 1, 1, 1, 1, 1, 1],
    "power": [
        0,
        0.248938,
        0.99575,
        0.888641,
        0.809737,
        0.748516,
        0.594416,
        0.491021,
        0.476071,
        0.438203,
    ],
}


def optimizer(*rates):
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": rate} for rate in rates]
    return torch.optim.SGD(groups)


def args(style, **changes):
    settings = {"num_warmup_steps": 4, "num_constant_steps": 2, "num_decay_steps": 10}
    if style == "constant":
        settings["num_decay_steps"] = 0
    if style == "power":
        settings = {"num_warmup_steps": 4}
        settings["extra_lr_scheduler_args"] = ExtraLRSchedulerArgs(a=4, b=-0.51, c=8192)
    return LRSchedulerArgs(lr_decay_style=style, **{**settings, **changes})


def rates(schedule, steps):
    seen = []
    for _ in range(max(steps) + 1):
        seen.append(schedule.learning_rate)
        schedule.step()
    return [seen[step] for step in steps]


@pytest.mark.parametrize("style", sorted(DECAYS))
def test_factors_are_the_golden_ones(style):
    schedule = build_schedule(args(style), optimizer(0.02), 1000)
    expected = [0.02 * factor for factor in GOLDEN[style]]
    # The golden values have six decimals.
    assert rates(schedule, STEPS) == pytest.approx(expected, abs=0.02 * 6e-7)


@pytest.mark.parametrize("style", ["cosine", "linear", "exponential"])
def test_the_decay_ends_exactly_at_the_final_factor_with_the_run(style):
    schedule = build_schedule(args(style, num_decay_steps=None), optimizer(1.0), 50)
    *_, before, end, after = rates(schedule, [49, 50, 51])
    assert end == after == 0.1
    # The steepest of the three, the line, is 0.9 / 44 above its end one step before.
    assert 0.1 < before < 0.1 + 0.9 / 44 + 1e-9


def test_each_group_keeps_its_own_rate():
    target = optimizer(1.0, 0.25)
    schedule = build_schedule(args("linear"), target, 16)
    for _ in range(7):
        schedule.step()
    assert [group["lr"] for group in target.param_groups] == pytest.approx([0.91, 0.2275])


def test_a_run_shorter_than_its_warmup_never_leaves_it():
    schedule = build_schedule(LRSchedulerArgs(num_warmup_steps=200), optimizer(1.0), 100)
    assert rates(schedule, [0, 50, 100]) == [0.0, 0.25, 0.5]


def test_power_without_warmup_starts_at_the_full_rate():
    schedule = build_schedule(args("power", num_warmup_steps=0), optimizer(0.02), 100)
    assert schedule.learning_rate == 0.02


def test_state_is_json_and_restores_the_rates_exactly():
    original = build_schedule(args("cosine"), optimizer(3e-4, 1e-4), 16)
    for _ in range(9):
        original.step()
    state = json.loads(json.dumps(original.state_dict()))
    target = optimizer(3e-4, 1e-4)
    copy = build_schedule(args("cosine"), target, 16)
    copy.load_state_dict(state)
    assert rates(copy, [0, 1, 5]) == rates(original, [0, 1, 5])


def test_a_changed_rate_or_length_takes_effect_on_resume():
    original = build_schedule(args("linear"), optimizer(1.0), 16)
    for _ in range(6):
        original.step()
    resumed = build_schedule(args("linear", num_decay_steps=None), optimizer(2.0), 106)
    resumed.load_state_dict(original.state_dict())
    assert rates(resumed, [50]) == pytest.approx([2.0 * 0.55])


def test_a_second_phase_starts_from_the_rate_that_the_first_reached():
    first = build_schedule(args("linear"), optimizer(1.0, 0.5), 16)
    for _ in range(11):
        first.step()
    # As `LambdaLR` of the new schedule would be after its step 11, from base rates 0.55 and 0.275.
    target = optimizer(7.0, 7.0)
    second = build_schedule(args("cosine", num_warmup_steps=0, num_constant_steps=0), target, 16)
    second.continue_from(first.state_dict(), 5)
    reference = optimizer(0.55, 0.275)
    plain = build_schedule(args("cosine", num_warmup_steps=0, num_constant_steps=0), reference, 16)
    for _ in range(5):
        plain.step()
    expected = [group["lr"] for group in reference.param_groups]
    assert [group["lr"] for group in target.param_groups] == pytest.approx(expected)

    # The second phase, saved and resumed, goes on from the same rates.
    again = build_schedule(
        args("cosine", num_warmup_steps=0, num_constant_steps=0), optimizer(7.0, 7.0), 16
    )
    again.load_state_dict(json.loads(json.dumps(second.state_dict())))
    assert rates(again, [0, 3]) == rates(second, [0, 3])


def test_a_second_phase_needs_the_same_groups():
    first = build_schedule(args("linear"), optimizer(1.0), 16)
    second = build_schedule(args("linear"), optimizer(1.0, 1.0), 16)
    with pytest.raises(ValueError, match="has 1 parameter groups and this run's optimizer 2"):
        second.continue_from(first.state_dict(), 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_warmup_steps": -1}, "num_warmup_steps.*at least 0"),
        ({"lr_decay_style": "constant", "num_decay_steps": 3}, "must be 0 or null"),
        ({"lr_decay_style": "power"}, "needs `a`, `b` and `c`"),
        (
            {
                "lr_decay_style": "power",
                "num_constant_steps": 1,
                "extra_lr_scheduler_args": ExtraLRSchedulerArgs(a=1, b=-1, c=1),
            },
            "num_constant_steps` must be 0",
        ),
    ],
)
def test_wrong_sections_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        LRSchedulerArgs(**arguments)


def test_constants_of_another_decay_have_no_effect_and_say_so():
    with pytest.warns(NoEffectWarning, match="extra_lr_scheduler_args"):
        LRSchedulerArgs(extra_lr_scheduler_args=ExtraLRSchedulerArgs(a=1))
