"""Pipelines over GPUs, which talk by NCCL, compute what one process computes."""

import pytest
import torch

from lme_parallel.equality import compare_layout

pytestmark = pytest.mark.multigpu

WHOLE = {"stage": 0, "fsdp_algorithm": None}
LOOP = {"pipeline_parallel_world_size": 2, "pipeline_parallel_schedule": "1F1B"}
# Settings, processes, micro batches.
LAYOUTS = {
    "1F1B": ({**WHOLE, **LOOP, "num_pipeline_stages": 2}, 2, 4),
    "GPipe": (
        {**WHOLE, **LOOP, "num_pipeline_stages": 2, "pipeline_parallel_schedule": "GPipe"},
        2,
        4,
    ),
    "Interleaved1F1B": ({**WHOLE, **LOOP, "num_pipeline_stages": 4}, 2, 4),
    "InterleavedZeroBubble": (
        {
            **LOOP,
            "num_pipeline_stages": 4,
            "pipeline_parallel_schedule": "InterleavedZeroBubble",
        },
        2,
        4,
    ),
    "ZBVZeroBubble": (
        {**LOOP, "num_pipeline_stages": 4, "pipeline_parallel_schedule": "ZBVZeroBubble"},
        2,
        4,
    ),
    "DualPipeV": (
        {**LOOP, "num_pipeline_stages": 4, "pipeline_parallel_schedule": "DualPipeV"},
        2,
        5,
    ),
    "four": ({**WHOLE, **LOOP, "pipeline_parallel_world_size": 4, "num_pipeline_stages": 4}, 4, 6),
    "shards": ({"stage": 3, **LOOP, "num_pipeline_stages": 4}, 4, 2),
    "tensor": (
        {
            **WHOLE,
            **LOOP,
            "num_pipeline_stages": 2,
            "tensor_parallel_world_size": 2,
            "sequence_parallel": True,
        },
        4,
        2,
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_gpus_compute_what_one_process_computes(name):
    settings, size, accumulation = LAYOUTS[name]
    if torch.cuda.device_count() < size:
        pytest.skip(f"needs {size} GPUs")
    found = compare_layout(
        settings,
        size,
        accumulation=accumulation,
        options={"dropout": 0.2, "layers": 5, "is_tied": True},
        device_type="cuda",
    )
    assert [found.pop(each) for each in ("initial", "copies", "targets")] == [0.0] * 3
    # Sums over processes, and those of GPU kernels, are taken in another order.
    assert max(found.values()) < 1e-10, found
