"""Experts divided over GPUs compute what one process computes."""

import pytest
import torch

from lme_parallel.equality import compare_layout

pytestmark = pytest.mark.multigpu

TWO = {"expert_parallel_world_size": 2}
DDP = {"stage": 0, "fsdp_algorithm": None}
FEW = {"experts": 4, "dropout": 0.2}
# The second GPU gets no token.
LOPSIDED = {"experts": 4, "busy_experts": 2}
RECOMPUTE = {"gradient_checkpointing_method": "full"}
SELECTIVE = {
    "gradient_checkpointing_method": "selective",
    "gradient_checkpointing_args": {"save_ops": ("linear", "communication")},
}
# Settings, options of the model.
LAYOUTS = {
    "DDP": ({**TWO, **DDP}, FEW),
    "DDP, lopsided": ({**TWO, **DDP, **RECOMPUTE}, LOPSIDED),
    "stage 1": ({**TWO, "stage": 1}, FEW),
    "stage 3, lopsided": ({**TWO, "stage": 3}, LOPSIDED),
    "stage 3, recomputed in part": ({**TWO, "stage": 3, **SELECTIVE}, FEW),
    "stage 3, compiled": ({**TWO, "stage": 3, "torch_compile": True}, FEW),
    "stage 3, offload": ({**TWO, "stage": 3, "cpu_offload": True}, FEW),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_two_gpus_compute_what_one_process_computes(name):
    settings, options = LAYOUTS[name]
    found = compare_layout(settings, 2, options=options, device_type="cuda")
    assert [found.pop(each) for each in ("initial", "copies", "targets")] == [0.0] * 3
    # Norms of differences over norms, in fp64: sums over processes are taken in another order.
    assert max(found.values()) < 1e-10, found


def test_bf16_differs_by_roundings():
    found = compare_layout(
        {**TWO, "stage": 3}, 2, dtype=torch.bfloat16, steps=1, options=FEW, device_type="cuda"
    )
    assert (found["initial"], found["copies"]) == (0.0, 0.0)
    # As on the CPU, and products on a GPU round apart from the CPU's once more.
    assert 0 < found["all gradients"] < 16 * 2**-9
    assert found["loss"] < 2**-8
