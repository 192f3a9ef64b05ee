"""Layouts that divide experts compute what one process computes."""

import pytest
import torch

from lme_parallel.equality import compare_layout

TWO = {"expert_parallel_world_size": 2}
FOUR = {"expert_parallel_world_size": 4}
DDP = {"stage": 0, "fsdp_algorithm": None}
RECOMPUTE = {"gradient_checkpointing_method": "full"}
HYBRID = {
    "zero_topology": {
        "data_parallel_replication_world_size": 2,
        "data_parallel_sharding_world_size": 2,
    }
}
FEW = {"experts": 4, "dropout": 0.2}
# Settings, processes, options of the model.
LAYOUTS = {
    "DDP of 2": ({**TWO, **DDP}, 2, FEW),
    "stage 3 of 2": ({**TWO, "stage": 3}, 2, FEW),
}
# Norm of the difference over the norm: sums over processes are taken in another order.
BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-6}


def check(found, dtype):
    # Every bit: first values, targets, and what several processes hold.
    assert [found.pop(each) for each in ("initial", "copies", "targets")] == [0.0] * 3
    assert max(found.values()) < BOUNDS[dtype], found


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_computes_what_one_process_computes(name):
    settings, size, options = LAYOUTS[name]
    check(compare_layout(settings, size, options=options), torch.float64)
