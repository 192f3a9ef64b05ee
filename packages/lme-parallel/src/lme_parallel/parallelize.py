"""The order in which a model is prepared for its devices, in one function."""

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

    The order is: axes that change the model, recomputation, compilation, placement over the data-parallel
    processes, memory and first values, lower-precision copies. With several processes a process
    group must exist,
    and every process calls this at the same time.

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
        ValueError: If a setting does not fit the model or is not supported, naming it.
    """
    _check_supported(topology)
    if dtype == torch.float16 and scaler is None:
        raise ValueError("`dtype` torch.float16 needs a `scaler`, or small gradients vanish")
    blocks = _blocks(model)
    appliers = check_axes(model, topology, args, device=device, compile_backend=compile_backend)
    mesh = _make_mesh(topology, device)
    axes = AppliedAxes([apply(mesh) for apply in appliers] if mesh is not None else [])
    initial_value = axes.values(initial_value)
    apply_recompute(blocks, args)
    if args.torch_compile:
        apply_compile(blocks.values(), backend=compile_backend)
    if mesh is None:
        placement: Placement = place_whole(
            model, device=device, dtype=dtype, initial_value=initial_value, masters=masters
        )
        return DistributedRuntime(model, placement, device=device, scaler=scaler)
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
    return DistributedRuntime(
        model,
        axes.place(placement),
        device=device,
        mesh=mesh,
        scaler=scaler,
        prepare=axes.prepare,
    )


def _make_mesh(topology: Topology, device: torch.device) -> "Mesh | None":
    if topology.is_single:
        return None
    from lme_parallel.mesh import Mesh  # noqa: PLC0415 (slow to load; for several processes)

    return Mesh.of(topology, device)


def _check_supported(topology: Topology) -> None:
    axes = {
        "pipeline_parallel_world_size": topology.pipeline,
        "context_parallel_world_size": topology.context,
    }
    for name, size in axes.items():
        if size > 1:
            raise ValueError(f"`{name}: {size}` is not supported yet; use 1")


def _blocks(model: nn.Module) -> Mapping[str, nn.Module]:
    blocks = getattr(model, "blocks", None)
    if not isinstance(blocks, nn.ModuleDict):
        raise ValueError(
            f"a model must have `blocks`, a ModuleDict keyed by layer index;"
            f" {type(model).__name__} has none"
        )
    return dict(blocks.items())
