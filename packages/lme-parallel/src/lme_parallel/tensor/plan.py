"""What tensor parallelism does to a model, read from the `shard_plan` of its modules.

Arithmetic on a model that may be on meta: nothing is changed and no process is asked.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from torch import nn

from lme_parallel.tensor.cut import Cut, even_runs

logger = logging.getLogger(__name__)

# Rows of a vocabulary come in multiples of this where there are enough: matrix units like it.
_VOCABULARY_STEP = 64


@dataclass(frozen=True, slots=True)
class Style:
    """How the parameters of a child are cut."""

    weight: int
    """Dim of `weight`, and of other parameters."""
    bias: int | None
    """Dim of `bias`; `None`: it stays whole, and one process adds it."""
    sums: bool
    """Whether results are shares that have to be summed."""


STYLES: Mapping[str, Style] = MappingProxyType(
    {
        "column": Style(0, 0, False),
        "row": Style(1, None, True),
        "heads": Style(0, 0, False),
        "vocab": Style(0, 0, False),
        "expert_column": Style(1, 1, False),
        "expert_row": Style(2, None, True),
    }
)
"""By the name that a `shard_plan` gives. `heads` is `column` where every section of the rows can be
cut evenly; else all processes have all of them."""


@dataclass(frozen=True, slots=True)
class Stretch:
    """A module between two exchanges."""

    path: str
    module: nn.Module
    is_cut: bool
    """Whether each process does a part of its work; otherwise all do the same."""
    sums: bool
    """Whether its first result is a share that has to be summed."""


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """What is cut, and where processes have to speak to each other."""

    size: int
    rank: int
    stretches: tuple[Stretch, ...]
    cuts: Mapping[str, Cut]
    """By name of the parameter; those that are not here stay whole."""
    partial: frozenset[str]
    """Whole parameters of whose gradient each process has a share."""
    vocabulary: int
    """Tokens of the whole vocabulary; 0 where a pipeline stage has none."""
    vocabulary_rows: int
    """Rows of every process but the last, which has the rest."""


def read_plan(model: nn.Module, size: int, rank: int, *, sequence_parallel: bool) -> TensorPlan:
    """Read what tensor parallelism does to a model.

    Args:
        model: With `blocks`; modules say in `shard_plan` how their children and parameters are cut,
            in `shard_units` what must be divided, by the name of the setting, and in
            `shard_sections` which lengths follow each other on dim 0 of those whose parts are cut
            one by one. Not changed.
        size: Processes of the group.
        rank: Number of this one.
        sequence_parallel: Whether the sequence is cut between the modules.

    Returns:
        The plan.

    Raises:
        ValueError: If a module says nothing or its sizes do not divide, naming the setting.
    """
    stretches, cuts, partial = [], {}, set()
    for path, block in model.get_submodule("blocks").named_children():
        inside: set[str] = set()
        for each, module in _outermost(f"blocks.{path}", block):
            of_module = _cuts_below(each, module, size, rank)
            stretch = _stretch(each, module, of_module)
            stretches.append(stretch)
            cuts |= of_module
            names = {name for name, _ in module.named_parameters(prefix=each)}
            inside |= names
            if stretch.is_cut:
                partial |= names - of_module.keys() - set(_row_biases(each, module))
        if sequence_parallel:
            names = {name for name, _ in block.named_parameters(prefix=f"blocks.{path}")}
            partial |= names - inside
    vocabulary, rows, of_model = _vocabulary_cuts(model, size, rank)
    after = ("final_norm.",)
    partial |= {name for name, _ in model.named_parameters() if name.startswith(after)}
    return TensorPlan(
        size=size,
        rank=rank,
        stretches=tuple(stretches),
        cuts={**cuts, **of_model},
        partial=frozenset(partial),
        vocabulary=vocabulary,
        vocabulary_rows=rows,
    )


def children_of(module: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Yield name, child and style of the modules that a module's own `shard_plan` names."""
    for name, style in _plan_of(module).items():
        child = getattr(module, name, None)
        if isinstance(child, nn.Module):
            yield name, child, style


def _plan_of(module: nn.Module) -> Mapping[str, str]:
    return getattr(module, "shard_plan", None) or {}


def _planned(module: nn.Module) -> Iterator[tuple[str, str, nn.Parameter]]:
    """Yield what a module's own `shard_plan` cuts: its key, the parameter's name and itself."""
    for key in _plan_of(module):
        child = getattr(module, key, None)
        if isinstance(child, nn.Parameter):
            yield key, key, child
        elif isinstance(child, nn.Module):
            for leaf, parameter in child.named_parameters():
                yield key, f"{key}.{leaf}", parameter


def _outermost(path: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Find the modules that say how they are cut and are in no other such module."""
    if hasattr(module, "shard_plan"):
        if module.shard_plan is None:
            raise ValueError(
                f"`tensor_parallel_world_size` above 1 does not work with {type(module).__name__}"
                f" (`{path}`), whose `shard_plan` is None; set it to {{}} to keep it whole on each"
                " device, or use `tensor_parallel_world_size: 1`"
            )
        yield path, module
        return
    for name, child in module.named_children():
        yield from _outermost(f"{path}.{name}", child)


def _stretch(path: str, module: nn.Module, cuts: Mapping[str, Cut]) -> Stretch:
    styles = [style for each in module.modules() for _, _, style in children_of(each)]
    sums = any(STYLES[style].sums for style in styles)
    return Stretch(path, module, is_cut=bool(cuts), sums=sums)


def _cuts_below(path: str, module: nn.Module, size: int, rank: int) -> dict[str, Cut]:
    if not _divides(path, module, size):
        return {}
    cuts = {}
    for inner, each in module.named_modules(prefix=path):
        sections: Mapping[str, Sequence[int]] = getattr(each, "shard_sections", None) or {}
        for key, name, parameter in _planned(each):
            full, style = f"{inner}.{name}", _plan_of(each)[key]
            dim = _dim(style, name.rpartition(".")[-1], f"{inner}.{key}")
            if dim is None:
                continue
            lengths = sections.get(key, (parameter.shape[dim],)) if dim == 0 else None
            if style == "heads" and any(length % size for length in lengths or ()):
                continue
            cuts[full] = _even_cut(full, tuple(parameter.shape), dim, lengths, size, rank)
        _check_expert_bias(inner, each)
    return cuts


def _divides(path: str, module: nn.Module, size: int) -> bool:
    """Return whether a module can be cut, or warn that it stays whole, or refuse."""
    for inner, each in module.named_modules(prefix=path):
        units: Mapping[str, int] = getattr(each, "shard_units", None) or {}
        for setting, count in units.items():
            if count % size == 0:
                continue
            what = f"`{setting}` of {type(each).__name__} (`{inner}`)"
            if not getattr(module, "shard_or_whole", False):
                raise ValueError(
                    f"{what} must be a multiple of `tensor_parallel_world_size` ({size}), got"
                    f" {count}"
                )
            logger.warning(
                "%s is %d and no multiple of `tensor_parallel_world_size` (%d): every process"
                " computes and keeps all of this module",
                what,
                count,
                size,
            )
            return False
    return True


def _dim(style: str, leaf: str, path: str) -> int | None:
    if style not in STYLES:
        raise ValueError(
            f"the `shard_plan` of `{path}` must be one of {', '.join(STYLES)}; got {style!r}"
        )
    return STYLES[style].bias if leaf == "bias" else STYLES[style].weight


def _row_biases(path: str, module: nn.Module) -> Iterator[str]:
    """Name the biases that one process adds: all have their whole gradient."""
    for inner, each in module.named_modules(prefix=path):
        for name, child, style in children_of(each):
            if STYLES[style].bias is None and getattr(child, "bias", None) is not None:
                yield f"{inner}.{name}.bias"


def _check_expert_bias(path: str, module: nn.Module) -> None:
    for _, child, style in children_of(module):
        has_bias = style == "expert_row" and getattr(child, "bias", None) is not None
        if has_bias and getattr(module, "fused_name", None) is None:
            raise ValueError(
                f"`add_bias: true` of the experts `{path}` does not work with"
                " `tensor_parallel_world_size` above 1 and their `activation_function`; use one"
                " that the op `scattermoe` has, for example `swiglu`, or `add_bias: false`"
            )


def _even_cut(
    name: str,
    shape: tuple[int, ...],
    dim: int,
    sections: Sequence[int] | None,
    size: int,
    rank: int,
) -> Cut:
    lengths = (shape[dim],) if sections is None else tuple(sections)
    if sum(lengths) != shape[dim]:
        raise ValueError(
            f"`shard_sections` of `{name}` must add up to its {shape[dim]} rows, got {lengths}"
        )
    for length in lengths:
        if length % size:
            part = "" if len(lengths) == 1 else f"a section of {length} on "
            raise ValueError(
                f"{part}dim {dim} of `{name}`, {shape[dim]}, must be a multiple of"
                f" `tensor_parallel_world_size` ({size})"
            )
    return Cut(shape, dim, even_runs(lengths, size, rank))


def _vocabulary_cuts(model: nn.Module, size: int, rank: int) -> tuple[int, int, dict[str, Cut]]:
    cuts, V, rows = {}, 0, 0
    for name, child, style in children_of(model):
        for leaf, parameter in child.named_parameters():
            if style != "vocab":
                raise ValueError(f"`{name}` of a model can be cut by `vocab` only, got {style!r}")
            V = parameter.shape[0]
            rows = vocabulary_rows(V, size)
            bounds = min(rank * rows, V), min((rank + 1) * rows, V)
            cuts[f"{name}.{leaf}"] = Cut(tuple(parameter.shape), 0, (bounds,))
    return V, rows, cuts


def vocabulary_rows(V: int, size: int) -> int:
    """Choose how many rows of a vocabulary every process but the last holds.

    Args:
        V: Tokens.
        size: Processes.

    Raises:
        ValueError: If some process would have none.
    """
    even = -(-V // size)
    stepped = -(-even // _VOCABULARY_STEP) * _VOCABULARY_STEP
    for rows in (stepped, even):
        if rows * (size - 1) < V:
            return rows
    raise ValueError(
        f"`vocab_size` ({V}) is too small for `tensor_parallel_world_size` ({size}): a process"
        " would have no token"
    )
