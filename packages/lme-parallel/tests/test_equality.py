"""Every data-parallel layout computes what one process computes."""

import pytest
import torch

from lme_parallel.equality import compare_layout

LAYOUTS = {
    "stage 3": {"stage": 3},
    "stage 2": {"stage": 2},
    "stage 1": {"stage": 1},
    "stage 0": {"stage": 0},
    "DDP": {"stage": 0, "fsdp_algorithm": None},
}
# Norm of the difference over the norm: sums over ranks are taken in another order.
BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-6}


def check(found, dtype):
    assert found.pop("initial") == 0.0
    assert found.pop("copies") == 0.0
    assert found.pop("targets") == 0.0
    assert max(found.values()) < BOUNDS[dtype], found


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("world_size", [2, 4])
def test_a_layout_computes_what_one_process_computes(name, world_size):
    found = compare_layout(LAYOUTS[name], world_size, options={"dropout": 0.2})
    check(found, torch.float64)
