"""What expert parallelism does to a model, read from the `shard_plan` of its modules.

Arithmetic on a model that may be on meta: nothing is changed and no process is asked.
"""

from collections.abc import Iterator, Mapping
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
    """Full names of those by experts."""
    common: tuple[str, ...]
    """Full names of those beside them that all experts share."""


def expert_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield path and module of those that hold the experts of a layer.

    Args:
        model: Modules say in `shard_plan` which of their children are by experts.
    """
    for path, module in model.named_modules():
        if EXPERT_STYLES & set(_plan(module).values()):
            yield path, module


def expert_parameters(model: nn.Module) -> Iterator[str]:
    """Yield the full names of the parameters whose dim 0 is by experts."""
    for path, module in expert_modules(model):
        yield from _by_expert(path, module)


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
    by_expert = _by_expert(path, module)
    counts = {each.shape[0] for each in by_expert.values()}
    if len(counts) != 1:
        raise ValueError(
            f"parameters by experts must have as many on dim 0; those of {type(module).__name__}"
            f" (`{path}`) have {sorted(counts)}"
        )
    (count,) = counts
    if count % size:
        raise ValueError(
            f"`num_experts` of `{owner}` must be a multiple of `expert_parallel_world_size`"
            f" ({size}), got {count}; change one of them"
        )
    named = (name for name, _ in module.named_parameters(prefix=path))
    common = tuple(name for name in named if name not in by_expert)
    return ExpertLayer(owner, count, tuple(by_expert), common)


def _by_expert(path: str, module: nn.Module) -> dict[str, nn.Parameter]:
    found = {}
    for name, style in _plan(module).items():
        child = getattr(module, name, None)
        if style in EXPERT_STYLES and isinstance(child, nn.Module):
            found.update(child.named_parameters(prefix=f"{path}.{name}"))
    return found


def _plan(module: nn.Module) -> Mapping[str, str]:
    return getattr(module, "shard_plan", None) or {}


def _exchanges(module: nn.Module) -> bool:
    return callable(getattr(module, "dispatch", None)) and callable(
        getattr(module, "combine", None)
    )
