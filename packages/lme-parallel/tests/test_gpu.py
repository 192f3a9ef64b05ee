"""Every way of placing parameters on GPUs, against one process on the CPU in fp64."""

import pytest
import torch
from torch import distributed

from lme_parallel.compile import apply_compile
from lme_parallel.data import place_over
from lme_parallel.equality import (
    compare_layout,
    differences,
    make_args,
    rank_batches,
    run_steps,
    step_through,
)
from lme_parallel.mesh import Mesh
from lme_parallel.recompute import apply_recompute
from lme_parallel.runtime import DistributedRuntime
from lme_parallel.tiny import TinyModel
from lme_parallel.tiny_run import InitialValues, TinyMasters, TinyObjective
from lme_parallel.topology import Topology

PLACEMENTS = {
    "DDP": {"stage": 0, "fsdp_algorithm": None},
    "stage 0": {"stage": 0},
    "stage 1": {"stage": 1},
    "stage 2": {"stage": 2},
    "stage 3": {"stage": 3},
    "FSDP 1 stage 2": {"stage": 2, "fsdp_algorithm": 1},
    "FSDP 1 stage 3": {"stage": 3, "fsdp_algorithm": 1},
    "stage 3 offload": {"stage": 3, "cpu_offload": True},
    "FSDP 1 offload": {"stage": 3, "fsdp_algorithm": 1, "cpu_offload": True},
    "stage 3 recompute": {"stage": 3, "gradient_checkpointing_method": "full"},
}
CUDA = torch.device("cuda", 0)


@pytest.fixture(scope="module")
def group():
    """A group of this process alone, over gloo and NCCL."""
    torch.cuda.set_device(CUDA)
    distributed.init_process_group(
        "cpu:gloo,cuda:nccl", store=distributed.HashStore(), rank=0, world_size=1, device_id=CUDA
    )
    yield
    distributed.destroy_process_group()


def wrapped(settings, dtype, *, device=CUDA, backend=None):
    """Place the tiny model as several processes would, in a group of one."""
    args = make_args(settings)
    topology = Topology.from_args(args, 1, 0)
    with torch.device("meta"):
        model = TinyModel(dropout=0.2).to(torch.promote_types(dtype, torch.float32))
    blocks = dict(model.blocks.items())
    apply_recompute(blocks, args)
    if backend is not None:
        apply_compile(blocks.values(), backend=backend)
    mesh = Mesh.of(topology, device)
    placement = place_over(
        mesh,
        model,
        blocks,
        args,
        device=device,
        dtype=dtype,
        initial_value=InitialValues(model.shapes),
        masters=TinyMasters,
    )
    return DistributedRuntime(model, placement, device=device, mesh=mesh), topology


def compare(settings, dtype, *, steps=3, **options):
    runtime, topology = wrapped(settings, dtype, **options)
    found = step_through(runtime, topology, str(dtype), 2, steps)
    return differences([found], run_steps({}, str(dtype), 2, steps, {"dropout": 0.2}))


@pytest.mark.gpu
@pytest.mark.parametrize("name", PLACEMENTS)
def test_one_gpu_computes_what_the_cpu_computes(name, group):
    found = compare(PLACEMENTS[name], torch.float64)
    assert found.pop("initial") == found.pop("copies") == found.pop("targets") == 0.0
    assert max(found.values()) < 1e-10, found


@pytest.mark.gpu
@pytest.mark.parametrize("name", PLACEMENTS)
def test_bf16_on_one_gpu_is_as_good_as_on_the_cpu(name, group):
    found = compare(PLACEMENTS[name], torch.bfloat16, steps=1)
    # Other kernels round at other places: some roundings of 8 bits.
    assert found["all gradients"] < 2**-5
    assert found["loss"] < 2**-8


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["DDP", "stage 3", "stage 1", "FSDP 1 stage 3"])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_blocks_compute_the_same(name, backend, group):
    found = compare(PLACEMENTS[name], torch.float32, steps=2, backend=backend)
    # fp32 without TF32, kernels that sum in other orders.
    assert found["all gradients"] < 1e-5, found


@pytest.mark.gpu
def test_norm_and_clipping_do_not_wait_for_the_gpu(group):
    runtime, topology = wrapped({"stage": 3}, torch.float32)
    step_through(runtime, topology, str(torch.float32), 1, 1)
    runtime.forward_backward(TinyObjective(), rank_batches(topology, 0, 1))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        runtime.clip_gradients(1.0)
        runtime.finish_step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def layouts(count):
    """Layouts for that many GPUs, hybrid ones where they divide."""
    found = {name: settings for name, settings in PLACEMENTS.items() if name != "FSDP 1 offload"}
    if count % 2 == 0 and count >= 4:
        hybrid = {
            "data_parallel_replication_world_size": 2,
            "data_parallel_sharding_world_size": count // 2,
        }
        found["hybrid"] = {"stage": 3, "zero_topology": hybrid}
        found["FSDP 1 hybrid"] = {"stage": 3, "fsdp_algorithm": 1, "zero_topology": hybrid}
    return found


@pytest.mark.multigpu
@pytest.mark.parametrize("name", layouts(4))
def test_all_gpus_compute_what_one_process_computes(name):
    count = torch.cuda.device_count()
    if name not in layouts(count):
        pytest.skip(f"{name} needs an even number of GPUs, at least 4; found {count}")
    found = compare_layout(
        layouts(count)[name], count, options={"dropout": 0.2}, device_type="cuda"
    )
    assert found.pop("initial") == found.pop("copies") == found.pop("targets") == 0.0
    assert max(found.values()) < 1e-10, found
