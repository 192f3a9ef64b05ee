"""Context parallelism from the settings: checked first, then applied."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from lme_parallel.args import DistributedArgs
from lme_parallel.context.attention import ContextAttention
from lme_parallel.context.batch import CutBatch
from lme_parallel.context.collectives import add_up
from lme_parallel.context.layout import Layout
from lme_parallel.context.recurrence import cut_recurrence
from lme_parallel.context.ring import Ring
from lme_parallel.materialize import InitialValue
from lme_parallel.placement import Placement
from lme_parallel.tensor.collectives import Group
from lme_parallel.topology import Topology

if TYPE_CHECKING:
    from lme_parallel.mesh import Mesh


@dataclass(frozen=True, slots=True)
class ContextParallel:
    """A model whose sequences are cut, and what the rest of the layout has to know."""

    prepare: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
    """Cuts each batch."""

    def values(self, initial_value: InitialValue) -> InitialValue:
        """Return first values: parameters are whole."""
        return initial_value

    def place(self, placement: Placement) -> Placement:
        """Return the placement: it is over all that have other tokens."""
        return placement


def check_context_parallel(model: nn.Module, topology: Topology, args: DistributedArgs) -> Layout:
    """Check that every layer can run on sequences that are cut, before any process is spoken to.

    Args:
        model: Usually on meta, with `blocks`. Not changed.
        topology: Where this process stands.
        args: The `distributed_args` section.

    Returns:
        How sequences are cut.

    Raises:
        ValueError: If a layer cannot, naming it.
    """
    for name, block in model.get_submodule("blocks").named_children():
        mixers = [each for each in block.modules() if _is_attention(each) or _is_recurrent(each)]
        if not mixers:
            raise ValueError(
                f"`context_parallel_world_size: {topology.context}` does not work with block"
                f" {name}, {type(block).__name__}: none of its modules has `attend`, or"
                " `exchange_state` and `exchange_halo`, by which sequences that are cut are served;"
                " use `context_parallel_world_size: 1`"
            )
        for mixer in mixers:
            dropped = getattr(getattr(mixer, "config", None), "softmax_dropout", 0.0)
            if dropped:
                raise ValueError(
                    f"`softmax_dropout: {dropped}` of block {name} does not work with"
                    f" `context_parallel_world_size: {topology.context}`; use `softmax_dropout: 0`"
                )
    return Layout(
        topology.context,
        topology.coordinates["context"],
        args.context_parallel_load_balancing_method == "headtail",
    )


def apply_context_parallel(
    model: nn.Module, layout: Layout, mesh: "Mesh", args: DistributedArgs
) -> ContextParallel:
    """Let a model run on sequences that are cut; names of parameters stay.

    Args:
        model: As `check_context_parallel` saw it. Changed in place.
        layout: From there.
        mesh: The processes.
        args: The `distributed_args` section.

    Returns:
        What the rest of the layout has to know.
    """
    processes = mesh.context
    group = Group(processes.group_name, layout.size, layout.rank)
    ring = Ring(processes, layout.size, layout.rank)
    goes_around = args.context_parallel_attention == "ring"
    uncompiled = partial(_uncompiled, args=args)
    for module in _modules(model):
        if _is_attention(module):
            module.attend = uncompiled(
                ContextAttention(module.attend, layout, group, ring if goes_around else None)
            )
        elif _is_recurrent(module):
            cut_recurrence(module, layout, group, ring, uncompiled=uncompiled)
        elif hasattr(module, "reduce_counts"):
            module.reduce_counts = uncompiled(_AddUp(group))
            module.parts = layout.size
    # Tensor parallelism cuts each process's part of a sequence once more.
    multiple = args.tensor_parallel_world_size if args.sequence_parallel else 1
    return ContextParallel(CutBatch(layout, multiple))


@dataclass(frozen=True, slots=True)
class _AddUp:
    """Sums over the processes that have parts of the same sequences."""

    group: Group

    def __call__(self, counts: Tensor) -> Tensor:
        return add_up(counts, self.group)


def _uncompiled(function: Callable[..., Tensor], args: DistributedArgs) -> Callable[..., Tensor]:
    """Keep a compiler out of what speaks to other processes."""
    if not args.torch_compile:
        return function
    return cast(Callable[..., Tensor], torch.compiler.disable(function))


def _modules(model: nn.Module) -> list[Any]:
    """List the modules, whose attributes only they and the seam know."""
    return list(model.modules())


def _is_attention(module: nn.Module) -> bool:
    return callable(getattr(module, "attend", None))


def _is_recurrent(module: nn.Module) -> bool:
    return hasattr(module, "exchange_state") and hasattr(module, "exchange_halo")
