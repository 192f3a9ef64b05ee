"""Data parallelism: which placement of parameters a stage and an algorithm ask for."""

import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn

from lme_parallel.args import DistributedArgs
from lme_parallel.dtypes import torch_dtype
from lme_parallel.materialize import InitialValue, materialize
from lme_parallel.placement import Masters, Placement, WholeParameters

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

    from lme_parallel.mesh import Mesh

logger = logging.getLogger(__name__)

MakeMasters = Callable[[nn.Module, torch.dtype], Masters]


def place_whole(
    model: nn.Module,
    *,
    device: torch.device,
    dtype: torch.dtype,
    initial_value: InitialValue,
    masters: MakeMasters | None,
) -> WholeParameters:
    """Give a model memory and values in the only process.

    Args:
        model: Usually on meta. Changed in place.
        device: Where it computes.
        dtype: In what it computes.
        initial_value: First values.
        masters: Makes fp32 parameters behind a lower-precision model.
    """
    materialize(model, device, initial_value)
    return WholeParameters(model, make_masters(model, dtype, masters))


def place_over(
    mesh: "Mesh",
    model: nn.Module,
    blocks: Mapping[str, nn.Module],
    args: DistributedArgs,
    *,
    device: torch.device,
    dtype: torch.dtype,
    initial_value: InitialValue,
    masters: MakeMasters | None,
) -> Placement:
    """Spread a model over the data-parallel processes and give it memory and values.

    Args:
        mesh: The processes.
        model: Usually on meta. Changed in place.
        blocks: What is gathered as one, by layer.
        args: The `distributed_args` section.
        device: Where it computes.
        dtype: In what it computes.
        initial_value: First values.
        masters: Makes fp32 parameters behind a lower-precision model that is whole here.
    """
    if args.fsdp_algorithm == 3:
        logger.warning("`fsdp_algorithm: 3` runs as `fsdp_algorithm: 2`")
    communication = torch_dtype(args.communication_dtype)
    if args.stage == 0 and args.fsdp_algorithm in (None, 1):
        if args.sync_every_gradient_accumulation_step:
            logger.warning(
                "`sync_every_gradient_accumulation_step: true` has no effect with `stage: 0` and"
                " `fsdp_algorithm: %s`, where gradients are added up before they are sent",
                "null" if args.fsdp_algorithm is None else args.fsdp_algorithm,
            )
        from lme_parallel.replicated import (  # noqa: PLC0415 (for several processes)
            ReplicatedParameters,
        )

        materialize(model, device, initial_value)
        return ReplicatedParameters(
            model,
            make_masters(model, dtype, masters),
            mesh.data,
            groups=_expert_groups(mesh, model),
            communication_dtype=communication,
            overlap=not args.gradient_checkpointing_args.use_reentrant,
        )
    low = is_low(dtype)
    options = {
        "stage": args.stage,
        "compute_dtype": dtype if low else None,
        "reduce_dtype": torch.float32 if low and communication is None else communication,
        # There is nowhere else to keep parameters where the CPU computes.
        "offload": args.cpu_offload and device.type != "cpu",
    }
    if args.fsdp_algorithm == 1:
        from lme_parallel.flat import FlatParameters, wrap_model  # noqa: PLC0415 (slow to load)

        # Without a sum in each micro step gradients would be added up in low precision.
        sync = args.sync_every_gradient_accumulation_step is not False
        if not sync and low:
            logger.warning(
                "`sync_every_gradient_accumulation_step: false` with `fsdp_algorithm: 1` adds"
                " gradients up in low precision; use `fsdp_algorithm: 2`"
            )
        wrapped = wrap_model(model, mesh.sharding, device=device, **options)
        is_owner = mesh.root.get_local_rank("replicate") == 0
        return FlatParameters(
            wrapped,
            initial_value,
            is_owner=is_owner,
            sync_every_step=sync,
            offload=options["offload"],
        )
    from lme_parallel.sharded import (  # noqa: PLC0415 (slow to load; for several processes)
        ShardedParameters,
        adopt_values,
        shard_model,
    )

    apart = _expert_meshes(mesh, model)
    shard_model(model, blocks.values(), mesh.sharding, apart=apart, **options)
    materialize(
        model,
        device,
        initial_value,
        parameter_device=torch.device("cpu") if options["offload"] else None,
    )
    adopt_values(model)
    return ShardedParameters(model, stage=args.stage, sync_every_step=syncs_every_step(args))


def _expert_groups(mesh: "Mesh", model: nn.Module) -> dict[str, "ProcessGroup"]:
    """Return over which processes the gradients of experts are summed, by parameter."""
    if mesh.experts is None:
        return {}
    from lme_parallel.expert.plan import expert_parameters  # noqa: PLC0415 (for the axis in use)

    return dict.fromkeys(expert_parameters(model), mesh.experts.get_group("expert_replicate"))


def _expert_meshes(mesh: "Mesh", model: nn.Module) -> list[tuple[nn.Module, "DeviceMesh"]]:
    """Return over which processes experts are cut, by module."""
    if mesh.experts is None:
        return []
    from lme_parallel.expert.plan import expert_modules  # noqa: PLC0415 (for the axis in use)

    return [(module, mesh.expert_sharding) for _, module in expert_modules(model)]


def syncs_every_step(args: DistributedArgs) -> bool:
    """Return whether gradients are summed over processes in each micro step.

    Stages 2 and 3 promise that no process holds whole gradients, which needs it.
    """
    chosen = args.sync_every_gradient_accumulation_step
    if chosen is None:
        return args.stage >= 2
    if not chosen and args.stage >= 2:
        logger.warning(
            "`sync_every_gradient_accumulation_step: false` keeps whole gradients in each process"
            " between micro steps, which `stage: %d` would not; leave it out to save memory",
            args.stage,
        )
    return chosen


def is_low(dtype: torch.dtype) -> bool:
    """Return whether parameters are copies in a lower precision than they are kept in."""
    return dtype not in (torch.float32, torch.float64)


def make_masters(
    model: nn.Module, dtype: torch.dtype, masters: MakeMasters | None
) -> Masters | None:
    """Make fp32 parameters behind a model, where `dtype` needs them.

    Raises:
        ValueError: If it does and `masters` is missing.
    """
    if not is_low(dtype):
        return None
    if masters is None:
        raise ValueError(f"`dtype` {dtype} needs `masters`, the fp32 parameters behind the model")
    return masters(model, dtype)
