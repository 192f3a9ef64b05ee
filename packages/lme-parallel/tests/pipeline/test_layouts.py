"""Every schedule, with every other axis, computes what one process computes."""

import pytest
import torch

from lme_parallel.equality import (
    CLIP_AT,
    assemble,
    collect,
    evaluate,
    global_batches,
    make_args,
    rank_batches,
    relative,
    run_steps,
    tiny_runtime,
)
from lme_parallel.parallelize import parallelize
from lme_parallel.testing import run_distributed
from lme_parallel.tiny import IGNORED, TinyModel
from lme_parallel.tiny_run import InitialValues, TinyObjective
from lme_parallel.topology import Topology


def pipeline(schedule, stages=2):
    return {
        "pipeline_parallel_world_size": 2,
        "num_pipeline_stages": stages,
        "pipeline_parallel_schedule": schedule,
    }


WHOLE = {"stage": 0, "fsdp_algorithm": None}
RECOMPUTE = {"gradient_checkpointing_method": "full"}
HYBRID = {
    "zero_topology": {
        "data_parallel_replication_world_size": 2,
        "data_parallel_sharding_world_size": 2,
    }
}
TENSOR = {"tensor_parallel_world_size": 2}
TIED = {"is_tied": True}
# Settings, processes, micro batches, options of the model, which has five layers.
LAYOUTS = {
    "GPipe": ({**WHOLE, **pipeline("GPipe")}, 2, 2, {}),
    "GPipe, one micro batch, tied": ({**WHOLE, **pipeline("GPipe")}, 2, 1, TIED),
    "1F1B": ({**WHOLE, **pipeline("1F1B")}, 2, 4, TIED),
    "1F1B, few micro batches": ({**WHOLE, **pipeline("1F1B")}, 2, 1, {}),
    "1F1B of two stages a rank": ({**WHOLE, **pipeline("1F1B", 4)}, 2, 4, TIED),
    "Interleaved1F1B": ({**WHOLE, **pipeline("Interleaved1F1B", 4)}, 2, 2, {}),
    "FlexibleInterleaved1F1B": ({**WHOLE, **pipeline("FlexibleInterleaved1F1B", 4)}, 2, 3, {}),
    "LoopedBFS": ({**WHOLE, **pipeline("LoopedBFS", 4)}, 2, 3, TIED),
    "InterleavedZeroBubble": ({**WHOLE, **pipeline("InterleavedZeroBubble", 4)}, 2, 4, TIED),
    "ZBVZeroBubble": ({**WHOLE, **pipeline("ZBVZeroBubble", 4)}, 2, 3, {}),
    "ZBVZeroBubble, tied": ({**WHOLE, **pipeline("ZBVZeroBubble", 4)}, 2, 4, TIED),
    "DualPipeV": ({**WHOLE, **pipeline("DualPipeV", 4)}, 2, 5, TIED),
    "recomputed": ({**WHOLE, **RECOMPUTE, **pipeline("ZBVZeroBubble", 4)}, 2, 2, {}),
    "compiled": ({**WHOLE, "torch_compile": True, **pipeline("1F1B")}, 2, 2, {}),
    "one shard": ({"stage": 3, **pipeline("1F1B")}, 2, 2, TIED),
    "shards": ({"stage": 3, **RECOMPUTE, **pipeline("Interleaved1F1B", 4)}, 4, 2, TIED),
    "gradient shards": ({"stage": 2, **pipeline("1F1B")}, 4, 2, TIED),
    "state shards": ({"stage": 1, **pipeline("ZBVZeroBubble", 4)}, 4, 2, {}),
    "no shards": ({"stage": 0, **pipeline("InterleavedZeroBubble", 4)}, 4, 2, {}),
    "replicas": ({**WHOLE, **pipeline("DualPipeV", 4)}, 4, 4, TIED),
    "tensor": ({**WHOLE, **TENSOR, **pipeline("InterleavedZeroBubble", 4)}, 4, 2, {}),
    "tensor, sequence cut": (
        {**WHOLE, **TENSOR, "sequence_parallel": True, **pipeline("1F1B")},
        4,
        2,
        TIED,
    ),
    "hybrid shards": ({"stage": 3, **HYBRID, **pipeline("1F1B")}, 8, 2, TIED),
}
IN_FP32 = ("1F1B", "ZBVZeroBubble", "one shard")
IN_BF16 = ("ZBVZeroBubble, tied", "one shard")


def comparison(name, steps=2, **further):
    """The layout's settings and processes, and options of the comparison."""
    settings, size, accumulation, options = LAYOUTS[name]
    further = {"steps": steps, "options": {"layers": 5}, **further}
    options = {**further["options"], **options}
    return settings, size, {**further, "accumulation": accumulation, "options": options}


# All of them, so that those of as many processes share a group.
TABLE = {
    **{name: comparison(name, options={"dropout": 0.2, "layers": 5}) for name in LAYOUTS},
    **{f"{name}, fp32": comparison(name, dtype=torch.float32) for name in IN_FP32},
    **{f"{name}, bf16": comparison(name, 1, dtype=torch.bfloat16) for name in IN_BF16},
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
    # Gradients of single parameters that nearly cancel are as far off in one process.
    assert found.pop("gradients") < 1e-4
    check(found, torch.float32)


@pytest.mark.parametrize("name", IN_BF16)
def test_bf16_copies_compute_what_those_of_one_process_compute(name, compare):
    found = compare(TABLE, f"{name}, bf16")
    # The same kernels on the same tensors; gradients of a stage are added up in fp32 there.
    assert (found["initial"], found["copies"]) == (0.0, 0.0)
    assert found["loss"] < 1e-6
    assert found["all gradients"] < 2**-7


class Scaler:
    """A loss scale that stays, and what it was told."""

    def __init__(self, scale):
        self.value = scale
        self.found = []

    def scale(self, loss):
        return loss * self.value

    def inverse(self):
        return torch.tensor(1 / self.value)

    def update(self, found_inf):
        self.found.append(bool(found_inf))


def scaled_steps(settings, scale):
    """Take a step with a loss scale, and one whose gradients overflow in one stage only."""
    args = make_args(settings)
    is_group = torch.distributed.is_initialized()
    size = torch.distributed.get_world_size() if is_group else 1
    rank = torch.distributed.get_rank() if is_group else 0
    topology = Topology.from_args(args, size, rank)
    with torch.device("meta"):
        model = TinyModel(layers=4).double()
    scaler = Scaler(scale)
    runtime = parallelize(
        model,
        topology,
        args,
        device=torch.device("cpu"),
        dtype=torch.float64,
        initial_value=InitialValues(model.shapes),
        scaler=scaler,
    )
    runtime.forward_backward(TinyObjective(), global_batches(0, 4))
    norm = runtime.clip_gradients(CLIP_AT)
    gradients = collect(runtime, gradients=True)
    runtime.finish_step()
    if "final_norm.weight" in runtime.named_parameters():
        with torch.no_grad():
            runtime.named_parameters()["final_norm.weight"][0] = torch.inf
    sums = runtime.forward_backward(TinyObjective(), global_batches(1, 4))
    bad = runtime.clip_gradients(CLIP_AT)
    return {
        "gradients": gradients,
        "norm": norm,
        "found": scaler.found,
        "bad": bool(torch.isfinite(bad)),
        "loss": bool(torch.isfinite(sums.loss)),
    }


def test_every_process_scales_losses_and_sees_a_bad_step():
    single = scaled_steps({}, 1024.0)
    ranks = run_distributed(scaled_steps, 2, LAYOUTS["ZBVZeroBubble"][0], 1024.0)
    ranks += run_distributed(scaled_steps, 2, LAYOUTS["1F1B"][0], 1024.0)
    assert single["found"] == [False, True]
    for pair in (ranks[:2], ranks[2:]):
        wholes, _ = assemble([each["gradients"] for each in pair])
        for name, expected in assemble([single["gradients"]])[0].items():
            assert relative(wholes[name], expected) < 1e-10
        for each in pair:
            assert relative(each["norm"], single["norm"]) < 1e-10
            assert (each["found"], each["bad"], each["loss"]) == ([False, True], False, False)


def other_rows(settings):
    """Evaluate before a step, and take steps of rows of other lengths, one without targets."""
    runtime, topology = tiny_runtime(settings, "torch.float64", {"dropout": 0.2, "layers": 4})
    numbers = [evaluate(runtime, topology)]
    for step, (rows, length) in enumerate(((2, 6), (1, 9), (2, 6))):
        batches = global_batches(step, 4, rows=rows, length=length)
        if step == 1:
            # Rows of one step may differ too.
            batches[3] = global_batches(7, 1, rows=3, length=5)[0]
        if step == 2:
            for each in batches:
                each["labels"][:] = IGNORED
        sums = runtime.forward_backward(TinyObjective(), batches)
        numbers += [sums.loss, sums.targets, runtime.clip_gradients(None), *sums.values.values()]
        numbers.append(runtime.forward(TinyObjective(), batches[0]).extras["size"].total)
        runtime.finish_step()
    return torch.stack([each.double() for each in numbers])


def test_rows_of_any_length_come_at_any_time():
    single = other_rows({})
    # Of each step there are seven numbers; the last step has no targets.
    assert single[1 + 7 * 2 + 1] == 0
    for name in ("1F1B", "DualPipeV"):
        first, second = run_distributed(other_rows, 2, LAYOUTS[name][0])
        assert torch.equal(first, second)
        assert relative(first, single) < 1e-10
        assert float((first - single).abs().max()) < 1e-9


def phases(settings):
    runtime, topology = tiny_runtime(settings, "torch.float64", {"layers": 4})
    seen = []
    runtime.mark = seen.append
    runtime.forward_backward(TinyObjective(), rank_batches(topology, 0, 4))
    return seen


def test_a_watchdog_sees_every_pass():
    for name, stages in (("1F1B", 1), ("ZBVZeroBubble", 2)):
        for seen in run_distributed(phases, 2, LAYOUTS[name][0]):
            assert seen.count("forward") == 4 * stages
            assert seen.count("backward") == 4 * stages * (1 if stages == 1 else 2)


def test_each_process_holds_its_stages_only():
    ranks = run_distributed(run_steps, 2, LAYOUTS["1F1B"][0], "torch.float64", 1, 1, {"layers": 4})
    names = [set(each["initial"]) for each in ranks]
    assert {name.split(".")[1] for name in names[0] if name.startswith("blocks")} == {"0", "1"}
    assert "embedding.weight" in names[0]
    assert not {"lm_head.weight", "final_norm.weight"} & names[0]
    assert "lm_head.weight" in names[1]
    assert not names[0] & names[1]
