"""What expert parallelism does to a model, read from the `shard_plan` of its modules.

Arithmetic on a model that may be on meta: nothing is changed and no process is asked.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

EXPERT_STYLES = frozenset({"expert_column", "expert_row"})
"""What a `shard_plan` calls parameters whose dim 0 is by experts."""


@dataclass(frozen=True, slots=True)
class ExpertLayer:
    """A module that sends tokens to experts below it."""

    path: str
    experts: int
    """Of the whole layer."""
    parameters: tuple[str, ...]
    """Full names of those that are cut."""


def expert_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield path and module of those that hold the experts of a layer.

    Args:
        model: Modules say in `shard_plan` which of their children are by experts.
    """
    for path, module in model.named_modules():
        plan = getattr(module, "shard_plan", None) or {}
        if EXPERT_STYLES & set(plan.values()):
            yield path, module


def expert_parameters(model: nn.Module) -> Iterator[str]:
    """Yield the full names of the parameters whose dim 0 is by experts."""
    for path, module in expert_modules(model):
        yield from (name for name, _ in module.named_parameters(prefix=path))


def read_layers(model: nn.Module, size: int) -> tuple[ExpertLayer, ...]:
    """Read which parameters expert parallelism cuts.

    Args:
        model: Modules with `dispatch` and `combine` have modules below that hold experts. Not
            changed.
        size: Processes that share the experts of a layer.

    Returns:
        The layers; none for a model without experts.

    Raises:
        ValueError: If the experts of a layer do not divide, or its tokens cannot be sent, naming
            the setting.
    """
    return tuple(_read_layer(model, path, module, size) for path, module in expert_modules(model))


def _read_layer(model: nn.Module, path: str, module: nn.Module, size: int) -> ExpertLayer:
    owner = path
    while owner and not _exchanges(model.get_submodule(owner)):
        owner = owner.rpartition(".")[0]
    if not owner:
        raise ValueError(
            f"`expert_parallel_world_size: {size}` does not work with {type(module).__name__}"
            f" (`{path}`): no module above it has `dispatch` and `combine`; use"
            " `expert_parallel_world_size: 1`"
        )
    named = dict(module.named_parameters(prefix=path))
    by_expert = {
        f"{path}.{child}.{leaf}"
        for child, style in module.shard_plan.items()
        if style in EXPERT_STYLES and isinstance(getattr(module, child, None), nn.Module)
        for leaf, _ in getattr(module, child).named_parameters()
    }
    counts = {each.shape[0] for each in named.values()}
    if named.keys() != by_expert or len(counts) != 1:
        raise ValueError(
            f"dim 0 of every parameter of {type(module).__name__} (`{path}`) must be by experts,"
            f" as its `shard_plan` says; got {sorted(named)}"
        )
    (count,) = counts
    if count % size:
        raise ValueError(
            f"`num_experts` of `{owner}` must be a multiple of `expert_parallel_world_size`"
            f" ({size}), got {count}; change one of them"
        )
    return ExpertLayer(owner, count, tuple(named))


def _exchanges(module: nn.Module) -> bool:
    return callable(getattr(module, "dispatch", None)) and callable(
        getattr(module, "combine", None)
    )
