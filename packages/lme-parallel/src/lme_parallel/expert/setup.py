"""Expert parallelism from the settings: checked first, then applied, then put under a placement."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lme_parallel.args import DistributedArgs
from lme_parallel.expert.exchange import Exchange
from lme_parallel.expert.placement import CutExperts, ExpertCut, ExpertValues
from lme_parallel.expert.plan import ExpertLayer, read_layers
from lme_parallel.materialize import InitialValue
from lme_parallel.placement import Placement
from lme_parallel.topology import Topology

if TYPE_CHECKING:
    from lme_parallel.mesh import Mesh


@dataclass(frozen=True, slots=True)
class ExpertParallel:
    """A model of whose experts some are here, and what the rest of the layout has to know."""

    cuts: Mapping[str, ExpertCut]
    """By name of the parameter."""

    @property
    def prepare(self) -> Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] | None:
        """Nothing changes in a batch."""
        return None

    def values(self, initial_value: InitialValue) -> InitialValue:
        """Return first values of what is here."""
        return ExpertValues(initial_value, self.cuts)

    def place(self, placement: Placement) -> Placement:
        """Return a placement that knows what it holds a part of."""
        return CutExperts(placement, self.cuts)


def check_expert_parallel(model: nn.Module, args: DistributedArgs) -> None:
    """Check that the experts of a model can be divided, before any process is spoken to.

    Args:
        model: With all its layers; usually on meta. Not changed.
        args: The `distributed_args` section.

    Raises:
        ValueError: If a setting does not fit the model, naming it.
    """
    size = args.expert_parallel_world_size
    layers = read_layers(model, size)
    if not layers:
        raise ValueError(
            f"`expert_parallel_world_size: {size}` needs a model with experts, and this one has"
            " none; use `expert_parallel_world_size: 1`, or a `mlp_type: MoE`"
        )
    common = [name for layer in layers for name in layer.common]
    if common and args.fsdp_algorithm is not None:
        raise ValueError(
            f"`fsdp_algorithm: {args.fsdp_algorithm}` with `expert_parallel_world_size: {size}`"
            f" cannot place what all experts of a layer share, `{common[0]}`; use another"
            " `activation_function`, or `stage: 0` and `fsdp_algorithm: null`"
        )


def apply_expert_parallel(
    model: nn.Module, layers: tuple[ExpertLayer, ...], topology: Topology, mesh: "Mesh"
) -> ExpertParallel:
    """Keep the experts of this process, in place, and let tokens travel to the others.

    Args:
        model: As `read_layers` saw it, except that other axes may have cut other dims.
        layers: From there.
        topology: Where this process stands.
        mesh: The processes.

    Returns:
        What the rest of the layout has to know.
    """
    group = mesh.expert_mesh.get_group("expert").group_name
    cuts: dict[str, ExpertCut] = {}
    for layer in layers:
        count = layer.experts // topology.expert
        start = topology.coordinates["expert"] * count
        for name in layer.parameters:
            cuts[name] = _cut(model, name, start, start + count)
        exchange = Exchange(group, topology.expert, count)
        module: Any = model.get_submodule(layer.path)  # its attributes only the seam knows
        # A compiler cannot know how many tokens will come.
        module.dispatch = torch.compiler.disable(exchange.dispatch)
        module.combine = torch.compiler.disable(exchange.combine)
    return ExpertParallel(cuts)


def _cut(model: nn.Module, name: str, start: int, stop: int) -> ExpertCut:
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    whole = module.get_parameter(leaf)
    cut = ExpertCut(tuple(whole.shape), start, stop)
    local = whole.detach()[cut.region()].clone(memory_format=torch.contiguous_format)
    module.register_parameter(leaf, nn.Parameter(local, requires_grad=whole.requires_grad))
    return cut
