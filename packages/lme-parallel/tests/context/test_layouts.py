"""Context-parallel layouts compute what one process computes."""

import pytest
import torch

from lme_parallel.equality import compare_layout

TWO = {"context_parallel_world_size": 2}
RING = {"context_parallel_attention": "ring"}
BALANCED = {"context_parallel_load_balancing_method": "headtail"}
WHOLE = {"stage": 0, "fsdp_algorithm": None}
RECOMPUTE = {"gradient_checkpointing_method": "full"}
TENSOR = {"tensor_parallel_world_size": 2, "sequence_parallel": True}
# Settings, processes, options of the model. Rows of 6 tokens are padded to 8 where they are cut in
# four or eight: some processes have nothing but padding.
LAYOUTS = {
    "two": (TWO, 2, {"dropout": 0.2}),
    "two, balanced": ({**TWO, **BALANCED, **WHOLE}, 2, {"dropout": 0.2, "is_tied": True}),
    "two, ring": ({**TWO, **RING, **WHOLE}, 2, {"dropout": 0.2}),
    "two, ring, balanced": ({**TWO, **RING, **BALANCED}, 2, {"dropout": 0.2}),
    "two, recomputed": ({**TWO, **RING, **BALANCED, **RECOMPUTE}, 2, {"dropout": 0.2}),
    "two, compiled": ({**TWO, **BALANCED, **WHOLE, "torch_compile": True}, 2, {}),
    "four, ring, balanced": (
        {**RING, **BALANCED, "context_parallel_world_size": 4},
        4,
        {"dropout": 0.2},
    ),
    "two shards": ({**TWO, **BALANCED, "stage": 3}, 4, {"dropout": 0.2}),
    "two replicas": ({**TWO, **RING, **WHOLE}, 4, {"dropout": 0.2}),
    "two, tensor": ({**TWO, **BALANCED, **TENSOR}, 4, {"dropout": 0.2}),
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


@pytest.mark.parametrize("name", ["two, balanced", "two, ring, balanced"])
def test_so_does_fp32(name):
    settings, size, options = LAYOUTS[name]
    found = compare_layout(settings, size, dtype=torch.float32, options=options)
    # Single parameters' gradients nearly cancel, to a tenth of their terms.
    assert found.pop("gradients") < 1e-4
    check(found, torch.float32)
