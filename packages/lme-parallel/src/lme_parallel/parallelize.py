"""The order in which a model is prepared for its devices, in one function."""

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn

from lme_parallel.args import DistributedArgs
from lme_parallel.axes import AppliedAxes, check_axes
from lme_parallel.compile import apply_compile
from lme_parallel.data import MakeMasters, place_over, place_whole
from lme_parallel.materialize import InitialValue
from lme_parallel.placement import Placement
from lme_parallel.recompute import apply_recompute
from lme_parallel.runtime import DistributedRuntime, Scaler
from lme_parallel.topology import Topology

if TYPE_CHECKING:
    from lme_parallel.mesh import Mesh

logger = logging.getLogger(__name__)


def parallelize(
    model: nn.Module,
    topology: Topology,
    args: DistributedArgs,
    *,
    device: torch.device,
    dtype: torch.dtype,
    initial_value: InitialValue,
    masters: MakeMasters | None = None,
    scaler: Scaler | None = None,
    compile_backend: str = "inductor",
) -> DistributedRuntime:
    """Prepare a plain model for its devices and return what runs it.

    The order is: the stages of a pipeline, axes that change the model, recomputation, compilation,
    placement over the data-parallel processes, memory and first values, lower-precision copies.
    With several processes a process group must exist, and every process calls this at the same
    time.

    Args:
        model: Has `blocks`, keyed by layer index as a string; usually on meta. Changed in place.
        topology: Where this process stands.
        args: The `distributed_args` section.
        device: This process's device.
        dtype: What the model computes in; parameters that are updated stay fp32.
        initial_value: First value of a parameter or saved buffer: name and region (`None` for
            all of it) to a tensor on the CPU. Cut parameters ask for the part that is here.
        masters: Makes fp32 parameters behind a `bfloat16` or `float16` model; needed for those
            where parameters are whole in each process.
        scaler: Loss scale; needed for `float16`.
        compile_backend: Backend of `torch_compile: true`.

    Returns:
        The runtime, whose `model` computes in `dtype`.

    Raises:
        ValueError: If a setting does not fit the model naming it.
    """
    num_layers = len(_blocks(model))
    if dtype == torch.float16 and scaler is None:
        raise ValueError("`dtype` torch.float16 needs a `scaler`, or small gradients vanish")
    if topology.expert > 1:
        from lme_parallel.expert.setup import (  # noqa: PLC0415 (for the axis in use)
            check_expert_parallel,
        )

        # Of all layers: a stage of a pipeline may have no experts.
        check_expert_parallel(model, args)
    plan = None
    if topology.pipeline > 1:
        from lme_parallel.pipeline.setup import cut_model  # noqa: PLC0415 (for the axis in use)

        plan = cut_model(model, topology, args)
    elif topology.num_stages > 1:
        logger.warning(
            "`num_pipeline_stages: %d` has no effect with `pipeline_parallel_world_size: 1`",
            topology.num_stages,
        )
    blocks = _blocks(model)
    appliers = check_axes(model, topology, args, device=device, compile_backend=compile_backend)
    mesh = _make_mesh(topology, device)
    axes = AppliedAxes([apply(mesh) for apply in appliers] if mesh is not None else [])
    initial_value = axes.values(initial_value)
    apply_recompute(blocks, args, num_layers=num_layers)
    if args.torch_compile:
        apply_compile(blocks.values(), backend=compile_backend)
    if mesh is None:
        placement: Placement = place_whole(
            model, device=device, dtype=dtype, initial_value=initial_value, masters=masters
        )
        return DistributedRuntime(model, placement, device=device, scaler=scaler)
    forward = None
    if plan is not None:
        from lme_parallel.pipeline.setup import (  # noqa: PLC0415 (for the axis in use)
            placed_args,
            serve_parts,
        )

        forward = serve_parts(model)
        args = placed_args(args, topology, plan)
    placement = place_over(
        mesh,
        model,
        blocks,
        args,
        device=device,
        dtype=dtype,
        initial_value=initial_value,
        masters=masters,
    )
    placement = axes.place(placement)
    pipeline = None
    if plan is not None and forward is not None:
        from lme_parallel.pipeline.setup import make_pipeline  # noqa: PLC0415 (for the axis in use)

        pipeline = make_pipeline(model, plan, forward, placement, mesh, device)
        placement = pipeline.placement
    return DistributedRuntime(
        model,
        placement,
        device=device,
        mesh=mesh,
        scaler=scaler,
        prepare=axes.prepare,
        pipeline=pipeline,
    )


def _make_mesh(topology: Topology, device: torch.device) -> "Mesh | None":
    if topology.is_single:
        return None
    from lme_parallel.mesh import Mesh  # noqa: PLC0415 (slow to load; for several processes)

    return Mesh.of(topology, device)


def _blocks(model: nn.Module) -> Mapping[str, nn.Module]:
    blocks = getattr(model, "blocks", None)
    if not isinstance(blocks, nn.ModuleDict):
        raise ValueError(
            f"a model must have `blocks`, a ModuleDict keyed by layer index;"
            f" {type(model).__name__} has none"
        )
    return dict(blocks.items())
