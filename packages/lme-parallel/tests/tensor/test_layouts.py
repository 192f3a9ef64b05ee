"""Tensor-parallel layouts compute what one process computes."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lme_parallel.equality import (
    assemble,
    rank_batches,
    relative,
    run_steps,
    tiny_runtime,
)
from lme_parallel.testing import run_distributed
from lme_parallel.tiny_run import TinyObjective

TWO = {"tensor_parallel_world_size": 2}
TWO_CUT = {**TWO, "sequence_parallel": True}
FOUR = {"tensor_parallel_world_size": 4}
WHOLE = {"stage": 0, "fsdp_algorithm": None}
RECOMPUTE = {"gradient_checkpointing_method": "full"}
SELECTIVE = {
    "gradient_checkpointing_method": "selective",
    "gradient_checkpointing_args": {"save_ops": ("linear", "communication")},
}
HYBRID = {
    "zero_topology": {
        "data_parallel_replication_world_size": 2,
        "data_parallel_sharding_world_size": 1,
    }
}
BOTH = {
    "zero_topology": {
        "data_parallel_replication_world_size": 2,
        "data_parallel_sharding_world_size": 2,
    }
}
# Settings, processes, options of the model. Its 19 tokens go 10 and 9, or 5, 5, 5 and 4; its rows
# of 6 tokens are padded to 8 before four processes cut them.
LAYOUTS = {
    "two": (TWO, 2, {"dropout": 0.2}),
    "two, tied": ({**TWO, **WHOLE}, 2, {"is_tied": True}),
    "two, recomputed": ({**TWO, **RECOMPUTE}, 2, {"dropout": 0.2}),
    "two, sequence cut": ({**TWO_CUT, **WHOLE}, 2, {"dropout": 0.2}),
    "two, sequence cut, tied": (TWO_CUT, 2, {"dropout": 0.2, "is_tied": True}),
    "two, sequence cut, compiled": ({**TWO_CUT, "torch_compile": True, **WHOLE}, 2, {}),
    "two, sequence cut, recomputed": ({**TWO_CUT, **RECOMPUTE}, 2, {"dropout": 0.2}),
    "two, selective": ({**TWO, **SELECTIVE}, 2, {"dropout": 0.2}),
    "two, sequence cut, selective, compiled": (
        {**TWO_CUT, **SELECTIVE, "torch_compile": True, **WHOLE},
        2,
        {},
    ),
    "four": ({**FOUR, **WHOLE}, 4, {"dropout": 0.2}),
    "four, sequence cut": ({**FOUR, "sequence_parallel": True}, 4, {"dropout": 0.2}),
    "two shards": ({**TWO, "stage": 3}, 4, {"dropout": 0.2}),
    "two shards, sequence cut": ({**TWO_CUT, "stage": 3}, 4, {"dropout": 0.2, "is_tied": True}),
    "two gradient shards": ({**TWO_CUT, "stage": 2}, 4, {}),
    "two replicas": ({**TWO_CUT, **WHOLE}, 4, {"dropout": 0.2}),
    "two replicas of one shard": ({**TWO_CUT, "stage": 3, **HYBRID}, 4, {"dropout": 0.2}),
    "two replicas of two shards": ({**TWO_CUT, "stage": 3, **BOTH}, 8, {"is_tied": True}),
}
IN_FP32 = ("two", "two shards, sequence cut")
IN_BF16 = ("two, sequence cut", "two shards")
# All of them, so that those of as many processes share a group.
TABLE = {
    **{name: (*layout[:2], {"options": layout[2]}) for name, layout in LAYOUTS.items()},
    **{
        f"{name}, fp32": (*LAYOUTS[name][:2], {"dtype": torch.float32, "options": LAYOUTS[name][2]})
        for name in IN_FP32
    },
    **{
        f"{name}, bf16": (
            *LAYOUTS[name][:2],
            {"dtype": torch.bfloat16, "steps": 1, "options": LAYOUTS[name][2]},
        )
        for name in IN_BF16
    },
}
# Norm of the difference over the norm: sums over processes are taken in another order.
BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-6}


def check(found, dtype):
    # Every bit: first values, targets, and what several processes hold.
    assert [found.pop(each) for each in ("initial", "copies", "targets")] == [0.0] * 3
    assert max(found.values()) < BOUNDS[dtype], found


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_computes_what_one_process_computes(name, compare):
    check(compare(TABLE, name), torch.float64)


@pytest.mark.parametrize("name", IN_FP32)
def test_so_does_fp32(name, compare):
    found = compare(TABLE, f"{name}, fp32")
    # The gradients of single parameters have a test of their own.
    assert found.pop("gradients") < 1e-4
    check(found, torch.float32)


@pytest.mark.parametrize("name", ["two", "two, sequence cut"])
def test_no_gradient_in_fp32_is_further_from_the_truth_than_that_of_one_process(name):
    settings, size, options = LAYOUTS[name]
    truth, single = (gradients([run_steps({}, str(each), 2, 1, options)]) for each in BOUNDS)
    ranks = run_distributed(run_steps, size, settings, str(torch.float32), 2, 1, options)
    for name, actual in gradients(ranks).items():
        # Forward passes round differently, and sums that nearly cancel show it: the bound is 1e-6
        # where one process is that good. Two errors of one size may differ by a small factor.
        bound = max(1e-6, 4 * relative(single[name], truth[name]))
        assert relative(actual, truth[name]) < bound, name


def gradients(ranks):
    return assemble([each["history"][0]["gradients"] for each in ranks])[0]


@pytest.mark.parametrize("name", IN_BF16)
def test_bf16_differs_by_roundings_of_sums(name, compare):
    found = compare(TABLE, f"{name}, bf16")
    assert (found["initial"], found["copies"]) == (0.0, 0.0)
    # Shares are rounded to bf16, by at most 2**-9, before they are summed: in each of the two
    # layers' four exchanges forwards and backwards.
    assert 0 < found["all gradients"] < 8 * 2**-9
    assert found["loss"] < 2**-9


class Messages(TorchDispatchMode):
    """Counts sums over processes."""

    def __init__(self):
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.number += func is torch.ops._c10d_functional.all_reduce.default
        return func(*args, **(kwargs or {}))


def count_messages():
    counts = []
    for further in ({}, RECOMPUTE, SELECTIVE):
        settings = {**TWO, **WHOLE, **further}
        runtime, topology = tiny_runtime(settings, str(torch.float64), {})
        with Messages() as messages:
            runtime.forward_backward(TinyObjective(), rank_batches(topology, 0, 1))
        counts.append(messages.number)
    return counts


def test_what_came_from_others_is_not_asked_for_again():
    plain, recomputed, selective = run_distributed(count_messages, 2)[0]
    # Each of two layers sums results of attention once more, so that its MLP can run again; those
    # of the MLP, at its end, nothing needs.
    assert (recomputed - plain, selective - plain) == (2, 0)
