"""Tensor-parallel layouts on GPUs compute what one GPU computes."""

import pytest
import torch
from torch import distributed
from torch.optim import AdamW

from lme_parallel.equality import assemble, collect, make_args, relative
from lme_parallel.parallelize import parallelize
from lme_parallel.testing import run_distributed
from lme_parallel.tiny import TinyModel
from lme_parallel.tiny_run import InitialValues, TinyObjective, global_batches
from lme_parallel.topology import Topology

pytestmark = pytest.mark.multigpu

TWO = {"tensor_parallel_world_size": 2}
CUT = {**TWO, "sequence_parallel": True}
# Settings, dtype, and the bound on norms of differences over norms.
LAYOUTS = {
    "two": (TWO, "float64", 1e-10),
    "two, sequence cut": (CUT, "float64", 1e-10),
    "two, compiled": ({**CUT, "torch_compile": True}, "float64", 1e-10),
    # Products are cut into pieces, whose sums are taken in another order; gradients of single
    # parameters of this model nearly cancel, to a tenth of their terms.
    "asynchronous": ({**CUT, "use_async_tensor_parallel": True}, "float32", 1e-5),
    "asynchronous, compiled": (
        {**CUT, "use_async_tensor_parallel": True, "torch_compile": True},
        "float32",
        1e-5,
    ),
}


def train(settings, dtype, size, rank):
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    args = make_args(settings)
    with torch.device("meta"):
        model = TinyModel(dropout=0.2).to(getattr(torch, dtype))
    runtime = parallelize(
        model,
        Topology.from_args(args, size, rank),
        args,
        device=device,
        dtype=getattr(torch, dtype),
        initial_value=InitialValues(model.shapes),
    )
    optimizer = AdamW(runtime.named_parameters().values(), lr=1e-2)
    history = []
    for step in range(3):
        sums = runtime.forward_backward(TinyObjective(), global_batches(step, 2))
        gradients = collect(runtime, gradients=True)
        norm = runtime.clip_gradients(0.5)
        optimizer.step()
        runtime.finish_step()
        history.append({"gradients": gradients, "loss": sums.loss.cpu(), "norm": norm.cpu()})
    return history


def train_in_group(folder, settings, dtype):
    rank, size = distributed.get_rank(), distributed.get_world_size()
    distributed.destroy_process_group()
    distributed.init_process_group(
        "cpu:gloo,cuda:nccl",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=size,
        device_id=torch.device("cuda", rank),
    )
    return on_cpu(train(settings, dtype, size, rank))


def train_alone(dtype):
    return on_cpu(train({}, dtype, 1, 0))


def on_cpu(value):
    if isinstance(value, torch.Tensor):
        return value.cpu()
    if isinstance(value, dict):
        return {name: on_cpu(each) for name, each in value.items()}
    return [on_cpu(each) for each in value] if isinstance(value, list) else value


@pytest.mark.parametrize("name", LAYOUTS)
def test_two_gpus_compute_what_one_computes(name, fast_path):
    settings, dtype, bound = LAYOUTS[name]
    (single,) = run_distributed(train_alone, 1, dtype)
    ranks = run_distributed(
        train_in_group, 2, str(fast_path), settings, dtype, timeout_seconds=300.0
    )
    for step, expected in enumerate(single):
        wholes, is_same = assemble([each[step]["gradients"] for each in ranks])
        assert is_same
        for each, reference in assemble([expected["gradients"]])[0].items():
            assert relative(wholes[each], reference) < bound, (step, each)
        for each in ranks:
            assert relative(each[step]["loss"], expected["loss"]) < bound
            assert relative(each[step]["norm"], expected["norm"]) < bound
