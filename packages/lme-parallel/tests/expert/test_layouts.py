"""Layouts that divide experts compute what one process computes."""

import pytest
import torch

from lme_parallel.equality import compare_layout, differences, make_args, run_steps, tiny_runtime
from lme_parallel.testing import run_distributed
from lme_parallel.tiny import TinyModel
from lme_parallel.tiny_run import InitialValues
from lme_parallel.topology import Topology

TWO = {"expert_parallel_world_size": 2}
FOUR = {"expert_parallel_world_size": 4}
DDP = {"stage": 0, "fsdp_algorithm": None}
RECOMPUTE = {"gradient_checkpointing_method": "full"}
HYBRID = {
    "stage": 3,
    "zero_topology": {
        "data_parallel_replication_world_size": 2,
        "data_parallel_sharding_world_size": 2,
    },
}
TENSOR = {"tensor_parallel_world_size": 2}
CONTEXT = {"context_parallel_world_size": 2}
PIPELINE = {
    "pipeline_parallel_world_size": 2,
    "num_pipeline_stages": 2,
    "pipeline_parallel_schedule": "1F1B",
}
ZERO_BUBBLE = {
    "pipeline_parallel_world_size": 2,
    "num_pipeline_stages": 4,
    "pipeline_parallel_schedule": "ZBVZeroBubble",
}
SELECTIVE = {
    "gradient_checkpointing_method": "selective",
    "gradient_checkpointing_args": {"save_ops": ("linear", "communication")},
}
FEW = {"experts": 4, "dropout": 0.2}
# The first two experts get everything: of two processes the second gets no token, of four the
# last three.
LOPSIDED = {"experts": 4, "busy_experts": 2}
# By number of processes, so that they start once: settings, options of the model.
LAYOUTS = {
    2: {
        "DDP": ({**TWO, **DDP}, FEW),
        "DDP, lopsided": ({**TWO, **DDP}, LOPSIDED),
        "DDP, recomputed": ({**TWO, **DDP, **RECOMPUTE}, FEW),
        "stage 0, recomputed in part": ({**TWO, "stage": 0, **SELECTIVE}, FEW),
        "stage 1": ({**TWO, "stage": 1}, FEW),
        "stage 3, lopsided": ({**TWO, "stage": 3}, LOPSIDED),
        "stage 3, compiled": ({**TWO, "stage": 3, "torch_compile": True, **RECOMPUTE}, FEW),
    },
    4: {
        "DDP, 2 of 4": ({**TWO, **DDP}, FEW),
        "stage 3, 2 of 4": ({**TWO, "stage": 3, **RECOMPUTE}, FEW),
        "stage 2, 2 of 4": ({**TWO, "stage": 2}, {"experts": 6}),
        "stage 3, 4 of 4, lopsided": ({**FOUR, "stage": 3}, LOPSIDED),
        "hybrid, 2 of 4": ({**TWO, **HYBRID}, FEW),
        "hybrid, 4 of 4": ({**FOUR, **HYBRID}, FEW),
        "DDP, tensor 2": ({**TWO, **TENSOR, **DDP}, FEW),
        "stage 3, context 2": ({**TWO, **CONTEXT, "stage": 3}, FEW),
        "DDP, context 2": ({**FOUR, **CONTEXT, **DDP}, FEW),
        "DDP, pipeline 2": ({**TWO, **ZERO_BUBBLE, **DDP}, {**FEW, "layers": 4}),
        "stage 3, pipeline 2": ({**TWO, **PIPELINE, "stage": 3}, {**FEW, "layers": 3}),
        "stage 3, tensor 2": ({**TWO, **TENSOR, "sequence_parallel": True, "stage": 3}, FEW),
    },
}
NAMES = [(size, name) for size, layouts in LAYOUTS.items() for name in layouts]
STEPS, MICRO_BATCHES = 2, 8
# Norm of the difference over the norm: sums over processes are taken in another order.
BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-6}


def check(found, dtype):
    # Every bit: first values, targets, and what several processes hold.
    assert [found.pop(each) for each in ("initial", "copies", "targets")] == [0.0] * 3
    assert max(found.values()) < BOUNDS[dtype], found


def run_all(size):
    return {name: run_one(size, *layout) for name, layout in LAYOUTS[size].items()}


def run_one(size, settings, options):
    replicas = Topology.from_args(make_args(settings), size, 0).data_world_size
    return run_steps(settings, str(torch.float64), MICRO_BATCHES // replicas, STEPS, options)


@pytest.fixture(scope="module")
def ranks():
    return {size: run_distributed(run_all, size, size) for size in LAYOUTS}


@pytest.mark.parametrize(("size", "name"), NAMES)
def test_a_layout_computes_what_one_process_computes(size, name, ranks):
    single = run_steps({}, str(torch.float64), MICRO_BATCHES, STEPS, LAYOUTS[size][name][1])
    check(differences([each[name] for each in ranks[size]], single), torch.float64)


@pytest.mark.parametrize("placement", [DDP, {"stage": 3}])
def test_so_does_fp32(placement):
    found = compare_layout({**TWO, **placement}, 2, dtype=torch.float32, options=FEW)
    # Those of single parameters nearly cancel here; all together are what has to be near.
    assert found.pop("gradients") < 1e-5
    check(found, torch.float32)


@pytest.mark.parametrize("placement", [DDP, {"stage": 3}])
def test_bf16_differs_by_roundings_of_choices(placement):
    found = compare_layout({**TWO, **placement}, 2, dtype=torch.bfloat16, steps=1, options=FEW)
    assert (found["initial"], found["copies"]) == (0.0, 0.0)
    # The results of a token's two choices are rounded to bf16, by at most 2**-9, before they travel,
    # and so are their gradients: in each of two layers.
    assert 0 < found["all gradients"] < 8 * 2**-9
    assert found["loss"] < 2**-9


def hold(size):
    """What a process holds of the parameters by experts in each layout, and what it asked for."""
    found = {}
    for name, (settings, options) in LAYOUTS[size].items():
        values = InitialValues(TinyModel(**options).shapes)
        runtime, _ = tiny_runtime(settings, str(torch.float32), options, values)
        held = {
            each: p.numel() * p.element_size() for each, p in runtime.named_parameters().items()
        }
        found[name] = [
            sum(each for parameter, each in held.items() if ".experts." in parameter),
            4
            * sum(each for parameter, each in values.elements.items() if ".experts." in parameter),
        ]
    return found


@pytest.mark.parametrize("size", LAYOUTS)
def test_a_process_holds_its_share_of_the_experts(size):
    ranks = run_distributed(hold, size, size)
    for name, (settings, options) in LAYOUTS[size].items():
        model = TinyModel(**options)
        whole = sum(4 * p.numel() for n, p in model.named_parameters() if ".experts." in n)
        topology = Topology.from_args(make_args(settings), size, 0)
        # The largest part is rounded up: three experts over two processes are two and one.
        most = -(-options["experts"] // topology.expert // topology.expert_shard)
        # The experts' second biases, a part in forty, are whole under tensor parallelism.
        slack = 1.03 if topology.tensor > 1 else 1.0
        for held, asked in (each[name] for each in ranks):
            assert held == asked
            assert held <= slack * whole * most / options["experts"] / topology.tensor, name
        assert sum(held for held, _ in (each[name] for each in ranks)) >= whole
