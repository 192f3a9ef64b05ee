"""Tensor parallelism from the settings: checked first, then applied, then put under a placement."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, distributed, nn

from lme_parallel.args import DistributedArgs
from lme_parallel.materialize import InitialValue
from lme_parallel.placement import Placement
from lme_parallel.tensor.apply import apply_plan
from lme_parallel.tensor.asynchronous import check_asynchronous, overlap_products
from lme_parallel.tensor.collectives import Group
from lme_parallel.tensor.padding import PadBatch
from lme_parallel.tensor.placement import CutParameters, CutValues
from lme_parallel.tensor.plan import TensorPlan, read_plan
from lme_parallel.topology import Topology

if TYPE_CHECKING:
    from lme_parallel.mesh import Mesh


@dataclass(frozen=True, slots=True)
class TensorParallel:
    """A model that is cut, and what the rest of the layout has to know."""

    plan: TensorPlan
    group: Group
    prepare: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] | None
    """Changes each batch before the model sees it; `None`: nothing to change."""

    def values(self, initial_value: InitialValue) -> InitialValue:
        """Return first values of what is here."""
        return CutValues(initial_value, self.plan.cuts)

    def place(self, placement: Placement) -> Placement:
        """Return a placement that knows what it holds a part of."""
        return CutParameters(placement, self.plan, self.group)


def check_tensor_parallel(
    model: nn.Module, topology: Topology, args: DistributedArgs, device: torch.device
) -> TensorPlan:
    """Read what is to be done to a model, before any process is spoken to.

    Args:
        model: Usually on meta. Not changed.
        topology: Where this process stands.
        args: The `distributed_args` section.
        device: This process's device.

    Returns:
        The plan.

    Raises:
        ValueError: If a setting does not fit the model or the device, naming it.
    """
    check_asynchronous(args, device)
    return read_plan(
        model,
        topology.tensor,
        topology.coordinates["tensor"],
        sequence_parallel=args.sequence_parallel,
    )


def apply_tensor_parallel(
    model: nn.Module, plan: TensorPlan, mesh: "Mesh", args: DistributedArgs, *, backend: str
) -> TensorParallel:
    """Cut a model in place.

    Args:
        model: As `check_tensor_parallel` saw it.
        plan: From there.
        mesh: The processes.
        args: The `distributed_args` section.
        backend: Name of the compiler, for `use_async_tensor_parallel`.

    Returns:
        What the rest of the layout has to know.
    """
    processes = mesh.root.get_group("tensor")
    group = Group(
        processes.group_name, distributed.get_world_size(processes), distributed.get_rank(processes)
    )
    apply_plan(model, plan, group, sequence_parallel=args.sequence_parallel)
    if args.use_async_tensor_parallel:
        cut = [each.module for each in plan.stretches if each.is_cut]
        overlap_products(cut, processes, compile_each=not args.torch_compile, backend=backend)
    pads = args.sequence_parallel
    return TensorParallel(plan, group, PadBatch(group.size) if pads else None)
