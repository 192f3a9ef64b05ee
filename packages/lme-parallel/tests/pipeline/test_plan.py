"""How layers are cut, and in which order work and messages come."""

import itertools
import logging

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lme_parallel.args import DistributedArgs
from lme_parallel.pipeline.cut import Costs, cut_layers, stage_works
from lme_parallel.pipeline.orders import (
    Action,
    Kind,
    check_schedule,
    compute_orders,
    forward_orders,
    read_schedule,
)
from lme_parallel.pipeline.plan import Message, Transfer, add_transfers
from lme_parallel.pipeline.setup import cut_model
from lme_parallel.tiny import TinyModel
from lme_parallel.topology import Topology

works = st.floats(0.0, 10.0)


@given(works, st.lists(works, min_size=1, max_size=7), works, st.data())
def test_no_other_cut_has_a_less_busy_stage(embedding, blocks, head, data):
    stages = data.draw(st.integers(1, len(blocks)))
    costs = Costs(embedding, tuple(blocks), head)
    cuts = cut_layers(costs, stages)
    assert [layer for each in cuts for layer in each] == list(range(len(blocks)))
    assert all(len(each) > 0 for each in cuts)
    others = []
    for inner in itertools.combinations(range(1, len(blocks)), stages - 1):
        ends = (0, *inner, len(blocks))
        others.append(max(stage_works(costs, [range(*each) for each in itertools.pairwise(ends)])))
    # Sums are taken in another order.
    assert max(stage_works(costs, cuts)) <= min(others) * (1 + 1e-12)
    assert cut_layers(costs, stages) == cuts


def test_work_at_the_ends_moves_layers_to_other_stages():
    even, head = Costs(0.0, (1.0,) * 8, 0.0), Costs(0.1, (1.0,) * 8, 2.0)
    assert [len(each) for each in cut_layers(even, 4)] == [2, 2, 2, 2]
    assert [len(each) for each in cut_layers(head, 3)] == [3, 3, 2]
    # Of equal maxima the most even one, and of those the one whose stages end first.
    assert [len(each) for each in cut_layers(Costs(0.0, (1.0,) * 6, 3.0), 4)] == [1, 2, 2, 1]
    with pytest.raises(ValueError, match=r"`num_pipeline_stages` must be at most .* \(2\), got 3"):
        cut_layers(Costs(0.0, (1.0, 1.0), 0.0), 3)


def settings(schedule, ranks, each=1):
    return DistributedArgs(
        pipeline_parallel_world_size=ranks,
        num_pipeline_stages=ranks * each,
        pipeline_parallel_schedule=schedule,
        fsdp_algorithm=None,
        stage=0,
    )


# Schedule, stages a rank, numbers of micro batches.
SCHEDULES = [
    ("GPipe", 1, (1, 3, 8)),
    ("1F1B", 1, (1, 3, 8)),
    ("1F1B", 2, (4, 8)),
    ("Interleaved1F1B", 3, (4, 8)),
    ("FlexibleInterleaved1F1B", 2, (3, 10)),
    ("LoopedBFS", 2, (1, 5)),
    ("InterleavedZeroBubble", 2, (4, 8)),
    ("ZBVZeroBubble", 2, (1, 3, 9)),
    ("DualPipeV", 2, (8, 11)),
]


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize(("name", "each", "counts"), SCHEDULES)
def test_every_stage_runs_every_micro_batch_once_and_no_message_waits_for_ever(
    name, each, counts, ranks
):
    schedule = read_schedule(settings(name, ranks, each))
    for count in counts:
        plans = add_transfers(schedule, compute_orders(schedule, count))
        for rank, plan in enumerate(plans):
            done = [step for step in plan if isinstance(step, Action)]
            wanted = sorted(itertools.product(schedule.stages_of(rank), range(count)))
            for kinds in (
                {Kind.FORWARD},
                {Kind.BACKWARD, Kind.BACKWARD_INPUT},
                {Kind.BACKWARD, Kind.BACKWARD_WEIGHT},
            ):
                assert sorted((a.stage, a.micro) for a in done if a.kind in kinds) == wanted
        play(plans)


def play(plans):
    """Run all processes with messages that are handed over one by one, as on one GPU stream."""
    places, wires = [0] * len(plans), {}
    while any(place < len(plan) for place, plan in zip(places, plans, strict=True)):
        before = list(places)
        for rank, plan in enumerate(plans):
            while places[rank] < len(plan) and goes_on(plan[places[rank]], rank, wires):
                places[rank] += 1
        assert places != before, "all wait"
    assert not any(wires.values())


def goes_on(step, rank, wires):
    if isinstance(step, Action):
        return True
    sends = step.kind in (Message.SEND_FORWARD, Message.SEND_GRADIENT)
    what = step.kind.split("_")[1], step.stage, step.micro
    if sends:
        wires.setdefault((rank, step.peer), []).append(what)
        return True
    arrived = wires.get((step.peer, rank), [])
    if not arrived:
        return False
    # What comes first is what is waited for.
    assert arrived.pop(0) == what
    return True


def test_messages_of_two_processes_have_one_order_on_both():
    for name, each, counts in SCHEDULES:
        schedule = read_schedule(settings(name, 4, each))
        plans = add_transfers(schedule, compute_orders(schedule, counts[-1]))
        for left, right in itertools.combinations(range(4), 2):
            sides = [
                [
                    (step.kind.split("_")[1], step.stage, step.micro)
                    for step in plans[one]
                    if isinstance(step, Transfer) and step.peer == other
                ]
                for one, other in ((left, right), (right, left))
            ]
            assert sides[0] == sides[1]


def test_1f1b_keeps_as_many_micro_batches_as_there_are_stages_after():
    schedule = read_schedule(settings("1F1B", 4))
    for rank, order in enumerate(compute_orders(schedule, 8)):
        held, most = 0, 0
        for action in order:
            held += 1 if action.kind == Kind.FORWARD else -1
            most = max(most, held)
        assert most == 4 - rank


def test_stages_go_round_or_to_the_last_process_and_back():
    loop = read_schedule(settings("Interleaved1F1B", 3, 2))
    assert [loop.rank_of(each) for each in range(6)] == [0, 1, 2, 0, 1, 2]
    v_shaped = read_schedule(settings("ZBVZeroBubble", 3, 2))
    assert [v_shaped.rank_of(each) for each in range(6)] == [0, 1, 2, 2, 1, 0]
    assert v_shaped.stages_of(0) == (0, 5)
    evaluation = add_transfers(v_shaped, forward_orders(v_shaped))
    assert [[step.stage for step in plan] for plan in evaluation] == [
        [0, 0, 4, 5],
        [0, 1, 1, 3, 4, 4],
        [1, 2, 3, 3],
    ]


@pytest.mark.parametrize(
    ("schedule", "ranks", "each", "count", "words"),
    [
        ("GPipe", 2, 2, 4, r"`num_pipeline_stages` must be 2, got 4; .*`LoopedBFS`"),
        ("ZBVZeroBubble", 2, 1, 4, r"`num_pipeline_stages` must be 4, got 2"),
        ("DualPipeV", 2, 3, 8, r"`num_pipeline_stages` must be 4, got 6"),
        ("LoopedBFS", 2, 1, 4, r"must be 4 or more, got 2; with 2 use `1F1B`"),
        ("InterleavedZeroBubble", 4, 1, 4, r"must be 8 or more, got 4"),
        ("DualPipeV", 2, 2, 3, r"at least 4 micro batches.*got 3; .*_steps` to 4"),
        ("1F1B", 2, 2, 5, r"2 rounds, got 5; set `gradient_accumulation_steps` to 6"),
        ("InterleavedZeroBubble", 4, 2, 9, r"got 9; .*_steps` to 10"),
    ],
)
def test_what_cannot_work_is_named_with_what_would(schedule, ranks, each, count, words):
    args = settings(schedule, ranks, each)
    with pytest.raises(ValueError, match=words):
        check_schedule(args, count)


def test_one_pipeline_rank_has_nothing_to_check():
    check_schedule(DistributedArgs(), 1)


def tiny_plan(args, rank=0, **options):
    with torch.device("meta"):
        model = TinyModel(layers=5, **options)
    return model, cut_model(model, Topology.from_args(args, 2, rank), args)


def test_a_cut_is_told_once(caplog):
    caplog.set_level(logging.INFO)
    args = settings("1F1B", 2, 2)
    for rank in (0, 1):
        tiny_plan(args, rank)
    first, second = caplog.messages
    assert first.startswith("`pipeline_parallel_schedule: 1F1B` with `num_pipeline_stages: 4` runs")
    assert second.startswith("pipeline `Interleaved1F1B`: stage 0 on rank 0: layers 0 to 0 (77%")
    assert "stage 3 on rank 1: layers 4 to 4" in second


def test_names_stay_and_a_tied_weight_is_at_both_ends():
    args = settings("1F1B", 2)
    with torch.device("meta"):
        whole = dict(TinyModel(layers=5, is_tied=True).named_parameters())
    names = []
    for rank in (0, 1):
        model, plan = tiny_plan(args, rank, is_tied=True)
        assert plan.shared == {"embedding.weight"}
        names.append(set(dict(model.named_parameters())))
    assert names[0] | names[1] == set(whole)
    assert names[0] & names[1] == {"embedding.weight"}


def test_splits_that_cannot_be_are_told(caplog):
    assert tiny_plan(settings("ZBVZeroBubble", 2, 2))[1].splits
    # Others may have asked for messages below warnings, of which there is one a model.
    assert not [each for each in caplog.records if each.levelname == "WARNING"]
    args = DistributedArgs(
        pipeline_parallel_world_size=2,
        num_pipeline_stages=4,
        pipeline_parallel_schedule="ZBVZeroBubble",
        gradient_checkpointing_method="full",
    )
    assert not tiny_plan(args)[1].splits
    assert "computed together" in caplog.text
