"""Whether a layout computes what one process computes: steps of a tiny model, compared.

For tests. `compare_layout` runs a few optimizer steps on several processes and on one, from the
same data, and reports how far initial values, losses, gradients and parameters are apart.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, distributed
from torch.optim import SGD, AdamW, Optimizer

from lme_parallel.args import DistributedArgs, GradientCheckpointingArgs, ZeroTopologyArgs
from lme_parallel.parallelize import parallelize
from lme_parallel.runtime import DistributedRuntime
from lme_parallel.shards import Shard
from lme_parallel.testing import run_distributed
from lme_parallel.tiny import TinyModel
from lme_parallel.tiny_run import InitialValues, TinyMasters, TinyObjective, global_batches
from lme_parallel.topology import Topology

_NESTED = {
    "zero_topology": ZeroTopologyArgs,
    "gradient_checkpointing_args": GradientCheckpointingArgs,
}
CLIP_AT = 0.5
"""Gradient norm, below what the tiny model has, so that clipping acts."""


def make_args(settings: Mapping[str, Any]) -> DistributedArgs:
    """Build a `distributed_args` section from plain values.

    Args:
        settings: As in a run file, nested sections as mappings.
    """
    values = {
        name: _NESTED[name](**value) if name in _NESTED else value
        for name, value in settings.items()
    }
    return DistributedArgs(**values)


def compare_layout(
    settings: Mapping[str, Any],
    world_size: int,
    *,
    dtype: torch.dtype = torch.float64,
    accumulation: int = 2,
    steps: int = 3,
    options: Mapping[str, Any] | None = None,
    device_type: str = "cpu",
) -> dict[str, float]:
    """Run steps in a layout and in one process, and measure how far they are apart.

    Args:
        settings: The `distributed_args` section.
        world_size: Processes.
        dtype: Of the computation; parameters are fp64 with fp64, fp32 with any other.
        accumulation: Micro batches of a step on each data-parallel rank.
        steps: Optimizer steps, with clipping.
        options: Of `TinyModel`.
        device_type: What the layout runs on; the one process is always on the CPU.

    Returns:
        The largest over parameters and steps of the norm of the difference over the norm, for
        `initial`, `gradients`, `parameters`, and relative differences of `loss`, `values`,
        `norm`, `evaluation`. `all gradients` and so on is that of all parameters together.
        Copies that must be equal to the bit are `copies`: 0 or infinity.
    """
    arguments = (dict(settings), str(dtype), accumulation, steps, dict(options or {}))
    ranks = run_distributed(run_steps, world_size, *arguments, device_type, device_type=device_type)
    # The replicas' micro batches one after the other.
    replicas = Topology.from_args(make_args(settings), world_size, 0).data_world_size
    single = run_steps({}, str(dtype), accumulation * replicas, steps, dict(options or {}))
    return differences(ranks, single)


def run_steps(
    settings: Mapping[str, Any],
    dtype: str,
    accumulation: int,
    steps: int,
    options: Mapping[str, Any],
    device_type: str = "cpu",
) -> dict[str, Any]:
    """Run steps on this process, and return what it holds after each.

    Args:
        settings: The `distributed_args` section.
        dtype: Of the computation, as `str(torch.float64)`.
        accumulation: Micro batches of a step on this rank.
        steps: Optimizer steps.
        options: Of `TinyModel`.
        device_type: Of this process's device, which has its rank's number.
    """
    runtime, topology = tiny_runtime(settings, dtype, options, device_type=device_type)
    return step_through(runtime, topology, dtype, accumulation, steps)


def step_through(
    runtime: DistributedRuntime, topology: Topology, dtype: str, accumulation: int, steps: int
) -> dict[str, Any]:
    """Run steps of a prepared model, and return on the CPU what is here after each.

    Args:
        runtime: Of the tiny model.
        topology: This process's place.
        dtype: Of the computation, as `str(torch.float64)`.
        accumulation: Micro batches of a step on this rank.
        steps: Optimizer steps.
    """
    optimizer = make_optimizer(runtime, dtype)
    initial, history = collect(runtime), []
    for step in range(steps):
        batches = rank_batches(topology, step, accumulation)
        sums = runtime.forward_backward(TinyObjective(), batches)
        gradients = collect(runtime, gradients=True)
        norm = runtime.clip_gradients(CLIP_AT)
        optimizer.step()
        runtime.finish_step()
        history.append(
            {
                "loss": sums.loss.cpu(),
                "values": torch.stack(
                    [sums.values[name].double().cpu() for name in sorted(sums.values)]
                ),
                "targets": sums.targets.cpu(),
                "norm": norm.cpu(),
                "evaluation": evaluate(runtime, topology).cpu(),
                "gradients": gradients,
                "parameters": collect(runtime),
            }
        )
    return {"initial": initial, "history": history}


def make_optimizer(runtime: DistributedRuntime, dtype: str) -> Optimizer:
    """Return AdamW in fp64, SGD with momentum else.

    Adam divides by the size of the gradient: where that is zero but for rounding errors, as for
    the bias of keys, it makes whole steps of these, which no layout shares with another.
    """
    parameters = runtime.named_parameters().values()
    if dtype == str(torch.float64):
        return AdamW(parameters, lr=1e-2, weight_decay=0.1)
    return SGD(parameters, lr=1e-2, momentum=0.9, weight_decay=0.1)


def evaluate(runtime: DistributedRuntime, topology: Topology) -> Tensor:
    """Return the mean loss over four micro batches that all processes share."""
    batches = global_batches(99, 4)[topology.data_rank :: topology.data_world_size]
    sums = [runtime.forward(TinyObjective(), batch) for batch in batches]
    total = torch.stack([each.total for each in sums]).sum()
    return total / torch.stack([each.targets for each in sums]).sum()


def tiny_runtime(
    settings: Mapping[str, Any],
    dtype: str,
    options: Mapping[str, Any],
    values: InitialValues | None = None,
    *,
    device_type: str = "cpu",
) -> tuple[DistributedRuntime, Topology]:
    """Prepare the tiny model in this process's place of a layout.

    Args:
        settings: The `distributed_args` section.
        dtype: Of the computation, as `str(torch.float64)`.
        options: Of `TinyModel`.
        values: First values; `None`: new ones.
        device_type: Of this process's device, which has its rank's number.
    """
    args = make_args(settings)
    is_group = distributed.is_initialized()
    size, rank = (distributed.get_world_size(), distributed.get_rank()) if is_group else (1, 0)
    topology = Topology.from_args(args, size, rank)
    computed = getattr(torch, dtype.removeprefix("torch."))
    with torch.device("meta"):
        model = TinyModel(**options).to(torch.promote_types(computed, torch.float32))
    runtime = parallelize(
        model,
        topology,
        args,
        device=torch.device("cpu") if device_type == "cpu" else torch.device(device_type, rank),
        dtype=computed,
        initial_value=InitialValues(model.shapes) if values is None else values,
        masters=TinyMasters,
        compile_backend="aot_eager",
    )
    return runtime, topology


def rank_batches(topology: Topology, step: int, accumulation: int) -> list[dict[str, Tensor]]:
    """Return this rank's micro batches of a step: every W-th of all."""
    size = topology.data_world_size
    return global_batches(step, accumulation * size)[topology.data_rank :: size]


def collect(runtime: DistributedRuntime, *, gradients: bool = False) -> dict[str, list[Any]]:
    """Return the parts of parameters or gradients that are here, with their places.

    Returns:
        By name: whole shape, and pairs of region (pairs of start and stop) and values.
    """
    shards = runtime.shards()
    found = {}
    for name, each in runtime.named_parameters().items():
        local = each.grad if gradients else each.detach()
        found[name] = [list(shards[name].shape), _parts(shards[name], local)]
    return found


def assemble(ranks: list[dict[str, list[Any]]]) -> tuple[dict[str, Tensor], bool]:
    """Put the parts of all ranks together.

    Args:
        ranks: From `collect`, by rank.

    Returns:
        Whole tensors by name, NaN where no rank had anything, and whether ranks that hold the
        same element hold the same bits.
    """
    wholes: dict[str, Tensor] = {}
    is_same = True
    for parts in ranks:
        for name, (shape, pairs) in parts.items():
            for bounds, values in pairs:
                if name not in wholes:
                    wholes[name] = torch.full(shape, torch.nan, dtype=values.dtype)
                place = wholes[name][tuple(slice(start, stop) for start, stop in bounds)]
                known = ~place.isnan()
                is_same = is_same and torch.equal(place[known], values[known])
                place.copy_(values)
    return wholes, is_same


def _parts(shard: Shard, local: Tensor | None) -> list[Any]:
    if local is None:
        return []
    return [
        [[[each.start, each.stop] for each in region], values.cpu().clone()]
        for region, values in shard.views(local.contiguous())
    ]


def differences(ranks: list[Any], single: Any) -> dict[str, float]:
    """Measure how far what several processes returned is from what one did.

    Args:
        ranks: From `run_steps` or `step_through`, by rank.
        single: The same of one process.

    Returns:
        As `compare_layout`.
    """
    found: dict[str, float] = {}
    found.update(dict.fromkeys(("initial", "gradients", "parameters", "copies"), 0.0))

    def compare(kind: str, parts: list[Any], expected: Any) -> None:
        wholes, is_same = assemble(parts)
        references, _ = assemble([expected])
        if not is_same:
            found["copies"] = float("inf")
        if wholes.keys() != references.keys():
            raise ValueError(f"{kind}: names differ: {wholes.keys() ^ references.keys()}")
        for name, reference in references.items():
            found[kind] = max(found[kind], relative(wholes[name], reference))
        pairs = [(wholes[name].flatten(), each.flatten()) for name, each in references.items()]
        left, right = (torch.cat(each) for each in zip(*pairs, strict=True))
        all_kind = f"all {kind}"
        found[all_kind] = max(found.get(all_kind, 0.0), relative(left, right))

    compare("initial", [each["initial"] for each in ranks], single["initial"])
    for number, expected in enumerate(single["history"]):
        steps = [each["history"][number] for each in ranks]
        for kind in ("gradients", "parameters"):
            compare(kind, [step[kind] for step in steps], expected[kind])
        for name in ("loss", "values", "targets", "norm", "evaluation"):
            for step in steps:
                difference = relative(step[name], expected[name])
                found[name] = max(found.get(name, 0.0), difference)
    return found


def relative(actual: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference over the norm of `expected`; NaN counts as infinite."""
    actual, expected = actual.double(), expected.double()
    difference = (actual - expected).norm() / expected.norm().clamp(min=1e-30)
    return float(difference.nan_to_num(nan=float("inf"), posinf=float("inf")))
