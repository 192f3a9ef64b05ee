"""Context-parallel layouts compute what one process computes."""

import pytest
import torch

from lme_parallel.equality import differences, make_args, run_steps
from lme_parallel.testing import run_distributed
from lme_parallel.topology import Topology

TWO = {"context_parallel_world_size": 2}
FOUR = {"context_parallel_world_size": 4}
RING = {"context_parallel_attention": "ring"}
BALANCED = {"context_parallel_load_balancing_method": "headtail"}
WHOLE = {"stage": 0, "fsdp_algorithm": None}
RECOMPUTE = {"gradient_checkpointing_method": "full"}
SELECTIVE = {
    "gradient_checkpointing_method": "selective",
    "gradient_checkpointing_args": {"save_ops": ("attention", "linear", "communication")},
}
TENSOR = {"tensor_parallel_world_size": 2, "sequence_parallel": True}
PIPELINE = {
    "pipeline_parallel_world_size": 2,
    "num_pipeline_stages": 2,
    "pipeline_parallel_schedule": "1F1B",
}
DROPPED = {"dropout": 0.2}
# By number of processes, so that they start once: settings, options of the model. Rows of 6 tokens
# are padded to 8 where they are cut in four or eight: some processes have nothing but padding.
LAYOUTS = {
    2: {
        "collected, shards": (TWO, DROPPED),
        "collected, balanced": ({**TWO, **BALANCED, **WHOLE}, {**DROPPED, "is_tied": True}),
        "ring": ({**TWO, **RING, **WHOLE}, DROPPED),
        "ring, balanced, shards": ({**TWO, **RING, **BALANCED, "stage": 2}, DROPPED),
        "recomputed": ({**TWO, **RING, **BALANCED, **RECOMPUTE}, DROPPED),
        "recomputed in part": ({**TWO, **BALANCED, **SELECTIVE}, DROPPED),
        "FSDP 1": ({**TWO, **BALANCED, "fsdp_algorithm": 1}, DROPPED),
        "compiled": ({**TWO, **BALANCED, **WHOLE, "torch_compile": True}, {}),
    },
    4: {
        "ring of four, balanced": ({**FOUR, **RING, **BALANCED}, DROPPED),
        "two of four shards": ({**TWO, **BALANCED, "stage": 3}, DROPPED),
        "two, replicas": ({**TWO, **RING, **WHOLE}, DROPPED),
        "two, tensor": ({**TWO, **BALANCED, **TENSOR}, DROPPED),
        "two, pipeline": ({**TWO, **BALANCED, **PIPELINE, **WHOLE}, DROPPED),
    },
}
# Norm of the difference over the norm: sums over processes are taken in another order.
BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-6}
ACCUMULATION, STEPS = 2, 2
IN_FP32 = {2: ["collected, balanced", "ring", "ring, balanced, shards"], 4: ["two of four shards"]}


def run_layouts(size, names, dtype):
    found = {}
    for name in names:
        settings, options = LAYOUTS[size][name]
        found[name] = run_steps(settings, dtype, ACCUMULATION, STEPS, options)
    return found


def run_alone(accumulation, dtype, options):
    return run_steps({}, dtype, accumulation, STEPS, options)


def compare(size, names, dtype):
    """How far each layout is from one process, by name."""
    ranks = run_distributed(run_layouts, size, size, names, str(dtype))
    found = {}
    for name in names:
        settings, options = LAYOUTS[size][name]
        replicas = Topology.from_args(make_args(settings), size, 0).data_world_size
        single = run_alone(ACCUMULATION * replicas, str(dtype), options)
        found[name] = differences([each[name] for each in ranks], single)
        # Every bit: first values, targets, and what several processes hold.
        for exact in ("initial", "copies", "targets"):
            assert found[name].pop(exact) == 0.0, (name, exact)
    return found


@pytest.mark.parametrize("size", LAYOUTS)
def test_layouts_compute_what_one_process_computes(size):
    found = compare(size, list(LAYOUTS[size]), torch.float64)
    worst = {name: max(each.values()) for name, each in found.items()}
    assert max(worst.values()) < BOUNDS[torch.float64], worst


@pytest.mark.parametrize("size", IN_FP32)
def test_so_they_do_in_fp32(size):
    for name, each in compare(size, IN_FP32[size], torch.float32).items():
        # Terms of some parameters' gradients cancel: those differ by a little more, 1.3e-6 at most.
        assert each.pop("gradients") < 4e-6, name
        assert max(each.values()) < BOUNDS[torch.float32], (name, each)
