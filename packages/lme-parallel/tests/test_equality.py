"""Every data-parallel layout computes what one process computes."""

import pytest
import torch

HYBRID = {
    "zero_topology": {
        "data_parallel_replication_world_size": 2,
        "data_parallel_sharding_world_size": 2,
    }
}
LAYOUTS = {
    "stage 3": ({"stage": 3}, 4),
    "stage 2": ({"stage": 2}, 2),
    "stage 1": ({"stage": 1}, 4),
    "stage 0": ({"stage": 0}, 2),
    "algorithm 3": ({"stage": 3, "fsdp_algorithm": 3}, 2),
    "hybrid stage 3": ({"stage": 3, **HYBRID}, 4),
    "hybrid stage 1": ({"stage": 1, **HYBRID}, 4),
    "DDP": ({"stage": 0, "fsdp_algorithm": None}, 4),
    "FSDP 1 stage 0": ({"stage": 0, "fsdp_algorithm": 1}, 2),
    "FSDP 1 stage 1": ({"stage": 1, "fsdp_algorithm": 1}, 2),
    "FSDP 1 stage 2": ({"stage": 2, "fsdp_algorithm": 1}, 4),
    "FSDP 1 stage 3": ({"stage": 3, "fsdp_algorithm": 1}, 4),
    "FSDP 1 hybrid": ({"stage": 3, "fsdp_algorithm": 1, **HYBRID}, 4),
}
# What each way of placing parameters is tried with besides.
PLACEMENTS = {
    "stage 3": {"stage": 3},
    "stage 1": {"stage": 1},
    "DDP": {"stage": 0, "fsdp_algorithm": None},
    "FSDP 1": {"stage": 3, "fsdp_algorithm": 1},
}
RECOMPUTE = {"gradient_checkpointing_method": "full"}
REENTRANT = {**RECOMPUTE, "gradient_checkpointing_args": {"use_reentrant": True}}
SELECTIVE = {"gradient_checkpointing_method": "selective"}
SYNC = "sync_every_gradient_accumulation_step"
# Placement, further settings, options of the comparison.
VARIANTS = {
    "stage 3, one micro batch, tied": (
        "stage 3",
        {},
        {"accumulation": 1, "options": {"is_tied": True}},
    ),
    "DDP, tied": ("DDP", {}, {"options": {"is_tied": True}}),
    "FSDP 1, tied": ("FSDP 1", {}, {"options": {"is_tied": True}}),
    "stage 3, recompute": ("stage 3", RECOMPUTE, {}),
    "stage 1, recompute": ("stage 1", RECOMPUTE, {}),
    "FSDP 1, recompute": ("FSDP 1", RECOMPUTE, {}),
    "DDP, reentrant": ("DDP", REENTRANT, {}),
    "stage 3, reentrant": ("stage 3", REENTRANT, {}),
    "stage 3, selective": ("stage 3", SELECTIVE, {}),
    "DDP, selective": ("DDP", SELECTIVE, {}),
    "FSDP 1, selective": ("FSDP 1", SELECTIVE, {}),
    "stage 3, selective, compile": (
        "stage 3",
        {**SELECTIVE, "torch_compile": True},
        {"steps": 1},
    ),
    "stage 3, compile": ("stage 3", {"torch_compile": True}, {"steps": 1}),
    "stage 1, sync every step": ("stage 1", {SYNC: True}, {}),
    "DDP, sync every step": ("DDP", {SYNC: True}, {}),
    "stage 3, sync at the end": ("stage 3", {SYNC: False}, {}),
    "FSDP 1, sync at the end": ("FSDP 1", {SYNC: False}, {}),
    "stage 3, offload": ("stage 3", {"cpu_offload": True}, {}),
}
DROPPED = {"options": {"dropout": 0.2}}
FP32 = {"dtype": torch.float32}
# All of them, so that those of as many processes share a group.
TABLE = {
    **{name: (*layout, DROPPED) for name, layout in LAYOUTS.items()},
    **{f"{name}, fp32": (each, 2, {**DROPPED, **FP32}) for name, each in PLACEMENTS.items()},
    **{
        f"{name}, bf16": (each, 2, {"dtype": torch.bfloat16, "steps": 1})
        for name, each in PLACEMENTS.items()
    },
    **{
        f"{name}, bf16 messages": ({**each, "communication_dtype": "bf16"}, 2, {**FP32, "steps": 1})
        for name, each in PLACEMENTS.items()
    },
    **{
        name: ({**PLACEMENTS[placement], **settings}, 2, {"steps": 2, **comparison})
        for name, (placement, settings, comparison) in VARIANTS.items()
    },
}
# Norm of the difference over the norm: sums over ranks are taken in another order.
BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-6}


def check(found, dtype):
    assert found.pop("initial") == 0.0
    assert found.pop("copies") == 0.0
    assert found.pop("targets") == 0.0
    assert max(found.values()) < BOUNDS[dtype], found


def test_the_table_has_them_all():
    assert len(TABLE) == len(LAYOUTS) + 3 * len(PLACEMENTS) + len(VARIANTS)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_computes_what_one_process_computes(name, compare):
    check(compare(TABLE, name), torch.float64)


@pytest.mark.parametrize("name", PLACEMENTS)
def test_so_does_fp32(name, compare):
    check(compare(TABLE, f"{name}, fp32"), torch.float32)


@pytest.mark.parametrize("name", PLACEMENTS)
def test_bf16_gradients_are_summed_in_fp32(name, compare):
    # One step: the next starts from weights that may round to another bf16 number.
    found = compare(TABLE, f"{name}, bf16")
    # Micro batches give the same bits everywhere, except where a kernel for short rows depends on
    # how memory is aligned: that is one rounding of a norm's weight to bf16.
    assert found["gradients"] < 2**-7
    assert found["all gradients"] < 1e-4
    assert found["loss"] < 1e-6
    assert found["norm"] < 1e-5


@pytest.mark.parametrize("name", PLACEMENTS)
def test_gradients_are_summed_in_the_dtype_asked_for(name, compare):
    found = compare(TABLE, f"{name}, bf16 messages")
    # bf16 has 8 bits: a rounding is 2**-9 at most, and about a third of that on average.
    assert 2**-11 < found["all gradients"] < 2**-8


@pytest.mark.parametrize("name", VARIANTS)
def test_so_it_does_with_other_settings(name, compare):
    check(compare(TABLE, name), torch.float64)
