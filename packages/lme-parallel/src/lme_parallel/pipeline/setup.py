"""Pipeline parallelism from the settings: checked first, then the model is cut, then put to work."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from lme_parallel.args import DistributedArgs
from lme_parallel.pipeline.cut import Costs, cut_layers, stage_works
from lme_parallel.pipeline.exchange import Exchange
from lme_parallel.pipeline.orders import Schedule, read_schedule
from lme_parallel.pipeline.part import PartForward, Sliceable, Stage
from lme_parallel.pipeline.placement import StageParameters, Tie
from lme_parallel.pipeline.run import Part
from lme_parallel.pipeline.runner import Runner
from lme_parallel.pipeline.sums import StageSums
from lme_parallel.placement import Placement
from lme_parallel.topology import Topology

if TYPE_CHECKING:
    from lme_parallel.mesh import Mesh

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PipelinePlan:
    """Which stages are here."""

    schedule: Schedule
    rank: int
    stages: Mapping[int, Stage]
    """Those of this process, by index."""
    shared: frozenset[str]
    """Parameters that the first and the last stage both hold."""
    splits: bool
    """Whether gradients of inputs and of parameters are computed one after the other."""


@dataclass(frozen=True, slots=True)
class Pipeline:
    """What the runtime needs of a pipeline."""

    runner: Runner
    sums: StageSums
    placement: StageParameters


def cut_model(model: nn.Module, topology: Topology, args: DistributedArgs) -> PipelinePlan:
    """Drop what other processes of the pipeline have; speaks to nobody.

    Args:
        model: Of the seam, usually on meta. Changed in place: names of parameters stay.
        topology: Where this process stands.
        args: The `distributed_args` section.

    Returns:
        What is here.

    Raises:
        ValueError: If the schedule, the stages and the layers do not go together, or the model
            cannot be cut, naming the setting.
    """
    schedule = read_schedule(args)
    if not all(hasattr(model, name) for name in ("part_costs", "part_ends", "forward_part")):
        raise ValueError(
            f"`pipeline_parallel_world_size: {schedule.ranks}` needs a model with `part_costs`,"
            f" `part_ends` and `forward_part`; {type(model).__name__} lacks them"
        )
    sliceable = cast(Sliceable, model)
    costs = Costs(*sliceable.part_costs())
    cuts = cut_layers(costs, schedule.stages)
    if topology.rank == 0:
        _log(args, schedule, cuts, stage_works(costs, cuts))
    rank = topology.coordinates["pipeline"]
    stages = {
        index: Stage(index, tuple(cuts[index]), index == 0, index == schedule.stages - 1)
        for index in schedule.stages_of(rank)
    }
    first, last = sliceable.part_ends()
    shared = {
        f"{name}.{inner}"
        for name in set(first) & set(last)
        for inner, _ in model.get_submodule(name).named_parameters()
    }
    _keep(
        sliceable,
        {layer for stage in stages.values() for layer in stage.layers},
        {
            *(first if any(each.is_first for each in stages.values()) else ()),
            *(last if any(each.is_last for each in stages.values()) else ()),
        },
        {*first, *last},
    )
    splits = schedule.is_split and _can_split(args, topology)
    if schedule.is_split and not splits and topology.rank == 0:
        logger.warning(
            "`pipeline_parallel_schedule: %s` fills bubbles with gradients of parameters, which"
            " here are computed together with those of inputs: with `torch_compile`,"
            " `use_async_tensor_parallel`, `gradient_checkpointing_method` or an `fsdp_algorithm`"
            " over several data-parallel ranks; results are the same",
            schedule.name,
        )
    return PipelinePlan(schedule, rank, stages, frozenset(shared), splits)


def placed_args(args: DistributedArgs, topology: Topology, plan: PipelinePlan) -> DistributedArgs:
    """Return settings for placing what is here: whole, where there is nobody to shard it with.

    Args:
        args: The `distributed_args` section.
        topology: Where this process stands.
        plan: From `cut_model`.
    """
    if plan.splits and _is_alone(topology):
        return replace(args, stage=0, fsdp_algorithm=None)
    return args


def make_pipeline(
    model: nn.Module,
    plan: PipelinePlan,
    forward: PartForward,
    placement: Placement,
    mesh: "Mesh",
    device: torch.device,
) -> Pipeline:
    """Put the stages that are here to work.

    Args:
        model: From `cut_model`, placed.
        plan: From there.
        forward: Of the model, from `serve_parts`.
        placement: Of its parameters.
        mesh: The processes.
        device: This process's device.
    """
    group = mesh.root.get_group("pipeline")
    first, last = plan.schedule.rank_of(0), plan.schedule.rank_of(plan.schedule.stages - 1)
    tie = None
    if plan.shared and first != last and plan.rank in (first, last):
        peer = last if plan.rank == first else first
        tie = Tie(plan.shared, group, peer, is_owner=plan.rank == first)
    placed = StageParameters(placement, tie)
    part = Part(
        schedule=plan.schedule,
        rank=plan.rank,
        stages=plan.stages,
        model=model,
        forward=forward,
        placement=placed,
        exchange=Exchange(group, device),
        splits=plan.splits,
    )
    return Pipeline(Runner(part), StageSums(group, device), placed)


def serve_parts(model: nn.Module) -> PartForward:
    """Let a call of the model run one of its stages; after everything that changes its parts."""
    forward = PartForward(cast(Sliceable, model))
    changed: Any = model
    # Only the instance changes: what hooks calls of the model still does.
    changed.forward = forward
    return forward


def _can_split(args: DistributedArgs, topology: Topology) -> bool:
    # Torch's split goes through the graph a second time, where these would compute all of it
    # again, refuse to, or miss the gradients that come later.
    return (
        not args.torch_compile
        and not args.use_async_tensor_parallel
        and args.gradient_checkpointing_method is None
        and (args.fsdp_algorithm is None or (_is_alone(topology) and not args.cpu_offload))
    )


def _is_alone(topology: Topology) -> bool:
    return topology.replicate * topology.shard == 1


def _keep(model: Sliceable, layers: set[int], kept: set[str], ends: set[str]) -> None:
    for name in [each for each in model.blocks if int(each) not in layers]:
        del model.blocks[name]
    for name in ends - kept:
        setattr(model, name, None)


def _log(
    args: DistributedArgs, schedule: Schedule, cuts: Sequence[range], works: Sequence[float]
) -> None:
    if schedule.name != args.pipeline_parallel_schedule:
        logger.info(
            "`pipeline_parallel_schedule: %s` with `num_pipeline_stages: %d` runs as `%s`",
            args.pipeline_parallel_schedule,
            schedule.stages,
            schedule.name,
        )
    mean = sum(works) / len(works)
    parts = [
        f"stage {index} on rank {schedule.rank_of(index)}: layers {each.start} to {each.stop - 1}"
        f" ({work / mean:.0%} of the mean work)"
        for index, (each, work) in enumerate(zip(cuts, works, strict=True))
    ]
    logger.info("pipeline `%s`: %s", schedule.name, "; ".join(parts))
