"""Axes that change the model before it is placed: each is checked, then applied, in one order."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from lme_parallel.args import DistributedArgs
from lme_parallel.materialize import InitialValue
from lme_parallel.placement import Placement
from lme_parallel.topology import Topology

if TYPE_CHECKING:
    from lme_parallel.mesh import Mesh

Batch = Mapping[str, Tensor]
Prepare = Callable[[Batch], Batch]


class Axis(Protocol):
    """A model that an axis changed, and what the rest of the layout has to know of it."""

    @property
    def prepare(self) -> Prepare | None:
        """Changes each batch before the model sees it; `None`: nothing to change."""
        ...

    def values(self, initial_value: InitialValue) -> InitialValue:
        """Return first values of what is here, from those of whole parameters."""
        ...

    def place(self, placement: Placement) -> Placement:
        """Return a placement that knows what it holds a part of."""
        ...


ApplyAxis = Callable[["Mesh"], Axis]
"""Changes the model in place; every process calls it at the same time."""


@dataclass(frozen=True, slots=True)
class AppliedAxes:
    """All axes of a layout that change the model, in the order they were applied."""

    axes: Sequence[Axis]

    def values(self, initial_value: InitialValue) -> InitialValue:
        """Return first values of what is here."""
        for axis in self.axes:
            initial_value = axis.values(initial_value)
        return initial_value

    def place(self, placement: Placement) -> Placement:
        """Return a placement that knows what it holds a part of."""
        # The last axis cut what the others had left: its part is made whole first.
        for axis in reversed(self.axes):
            placement = axis.place(placement)
        return placement

    @property
    def prepare(self) -> Prepare | None:
        """Changes each batch before the model sees it."""
        changes = [axis.prepare for axis in self.axes if axis.prepare is not None]
        if not changes:
            return None

        def prepare(batch: Batch) -> Batch:
            for change in changes:
                batch = change(batch)
            return batch

        return prepare


def check_axes(
    model: nn.Module,
    topology: Topology,
    args: DistributedArgs,
    *,
    device: torch.device,
    compile_backend: str,
) -> list[ApplyAxis]:
    """Check every axis in use, before any process is spoken to.

    Args:
        model: Usually on meta. Not changed.
        topology: Where this process stands.
        args: The `distributed_args` section.
        device: This process's device.
        compile_backend: Name of the compiler, for axes that compile.

    Returns:
        What applies them, in order.

    Raises:
        ValueError: If a setting does not fit the model or the device, naming it.
    """
    appliers: list[ApplyAxis] = []
    if topology.context > 1:
        from lme_parallel.context.setup import (  # noqa: PLC0415 (for the axis in use)
            apply_context_parallel,
            check_context_parallel,
        )

        layout = check_context_parallel(model, topology, args)
        appliers.append(lambda mesh: apply_context_parallel(model, layout, mesh, args))
    if topology.tensor > 1:
        from lme_parallel.tensor.setup import (  # noqa: PLC0415 (for the axis in use)
            apply_tensor_parallel,
            check_tensor_parallel,
        )

        plan = check_tensor_parallel(model, topology, args, device)
        appliers.append(
            lambda mesh: apply_tensor_parallel(model, plan, mesh, args, backend=compile_backend)
        )
    if topology.expert > 1:
        from lme_parallel.expert.plan import read_layers  # noqa: PLC0415 (for the axis in use)
        from lme_parallel.expert.setup import (  # noqa: PLC0415 (for the axis in use)
            apply_expert_parallel,
        )

        # After the tensor axis, which finds dims of whole parameters in its plan.
        layers = read_layers(model, topology.expert)
        appliers.append(lambda mesh: apply_expert_parallel(model, layers, topology, mesh))
    return appliers
