"""Which tensors are read for which, so that a conversion holds one rule's tensors at a time."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lme_convert.directory import ModelDirectory
from lme_convert.errors import ConversionError
from lme_convert.family import Family
from lme_convert.layout import Config, expected_parameters, layer_sizes
from lme_convert.rules import Rule, Sizes, Transform

# Rows compared at a time where a tied weight is stored twice.
_ROWS = 4096


@dataclass(frozen=True, slots=True)
class Step:
    """One rule at one layer: concrete names, the transform and the layer's sizes."""

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    transform: Transform
    sizes: Sizes


def make_steps(family: Family, config: Config) -> list[Step]:
    """Write out a family's rules for a model of ours.

    Args:
        family: Whose rules.
        config: Our `config.json`; decides the number of layers and which tensors exist.

    Returns:
        Steps in the order in which our tensors are stored.

    Raises:
        ConversionError: If a tensor of our model is made by no rule or by two.
    """
    expected, sizes_of = expected_parameters(config), layer_sizes(config)
    steps: list[Step] = []
    for rule in family.rules:
        places = enumerate(sizes_of) if "{i}" in rule.ours[0] else ((None, {}),)
        for layer, sizes in places:
            steps += [step] if (step := _step(rule, layer, sizes, expected)) else []
    made = Counter(name for step in steps for name in step.ours)
    for name in expected:
        if made[name] != 1:
            state = "no rule" if made[name] == 0 else "more than one rule"
            raise ConversionError(f"{state} of family {family.model_type} makes our `{name}`")
    place = {name: index for index, name in enumerate(expected)}
    return sorted(steps, key=lambda step: place[step.ours[0]])


def check_import(
    family: Family, steps: Sequence[Step], config: Config, source: ModelDirectory
) -> None:
    """Check that `source` holds exactly what the steps read, in shapes that fit.

    Raises:
        ConversionError: Naming a tensor that is missing, unmentioned or of another shape, or an
            output layer that a tied config promises to be the embedding and is not.
    """
    wanted = [name for step in steps for name in step.theirs]
    copies = {copy: of for copy, of in family.tied.items() if copy not in wanted and copy in source}
    ignored = [name for name in source.names if any(re.fullmatch(p, name) for p in family.ignored)]
    _check_names(source, wanted, {*copies, *ignored}, family)
    for name, shape in their_shapes(steps, expected_parameters(config)).items():
        _check_shape(source, name, shape)
    for copy, of in copies.items():
        _check_equal(source, copy, of)


def check_export(
    family: Family, steps: Sequence[Step], config: Config, source: ModelDirectory
) -> None:
    """Check that `source`, a directory of ours, holds exactly the tensors of its config.

    Raises:
        ConversionError: Naming a tensor that is missing, unmentioned or of another shape.
    """
    expected = expected_parameters(config)
    _check_names(source, list(expected), set(), family)
    for name, shape in expected.items():
        _check_shape(source, name, shape)
    their_shapes(steps, expected)


def their_shapes(
    steps: Iterable[Step], expected: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of theirs that makes our tensors of given shapes.

    Raises:
        ConversionError: If a rule cannot make tensors of these shapes.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    # One byte seen at every index: the way to theirs is views, which cost nothing. (Meta tensors
    # would do, but their operators import 90 MB of Python.)
    byte = torch.zeros((), dtype=torch.uint8)
    for step in steps:
        made = _apply(step, [byte.expand(expected[name]) for name in step.ours], ours=False)
        shapes |= {name: tuple(each.shape) for name, each in zip(step.theirs, made, strict=True)}
    return shapes


def read_ours(source: ModelDirectory, steps: Iterable[Step]) -> Iterator[tuple[str, Tensor]]:
    """Yield our tensors, made of theirs, one step at a time; none is kept once it is given."""
    for step in steps:
        made = _apply(step, [source.tensor(name) for name in step.theirs], ours=True)
        yield from _hand_over(step.ours, made)


def read_theirs(source: ModelDirectory, steps: Iterable[Step]) -> Iterator[tuple[str, Tensor]]:
    """Yield their tensors, made of ours, one step at a time; none is kept once it is given."""
    for step in steps:
        made = _apply(step, [source.tensor(name) for name in step.ours], ours=False)
        yield from _hand_over(step.theirs, made)


def _hand_over(names: Sequence[str], tensors: list[Tensor]) -> Iterator[tuple[str, Tensor]]:
    for name in names:
        yield name, tensors.pop(0)


def _step(
    rule: Rule, layer: int | None, sizes: Sizes, expected: Mapping[str, object]
) -> Step | None:
    ours = tuple(name.replace("{i}", str(layer)) for name in rule.ours)
    present = [name in expected for name in ours]
    if not any(present) or not rule.applies(sizes):
        return None
    if not all(present):
        raise ConversionError(f"the model has only some of the tensors that one rule makes: {rule}")
    theirs: list[str] = []
    for name in rule.theirs:
        at_layer = name.replace("{i}", str(layer))
        experts = range(sizes["num_experts"]) if "{e}" in name else (None,)
        theirs += [at_layer.replace("{e}", str(expert)) for expert in experts]
    return Step(tuple(theirs), ours, rule.transform, sizes)


def _check_names(
    source: ModelDirectory, wanted: Sequence[str], allowed: set[str], family: Family
) -> None:
    names = set(source.names)
    missing = next((name for name in wanted if name not in names), None)
    if missing is not None:
        raise ConversionError(
            f"`{source.path}` lacks tensor `{missing}`, which its config of family "
            f"{family.model_type} asks for"
        )
    unmentioned = sorted(names - set(wanted) - allowed)
    if unmentioned:
        more = f" and {len(unmentioned) - 1} more" if len(unmentioned) > 1 else ""
        raise ConversionError(
            f"`{source.path}` holds tensor `{unmentioned[0]}`{more}, which no rule of family "
            f"{family.model_type} uses under its config; nothing is dropped silently"
        )


def _check_shape(source: ModelDirectory, name: str, expected: tuple[int, ...]) -> None:
    if source.shape(name) != expected:
        raise ConversionError(
            f"`{name}` of `{source.path}` has shape {source.shape(name)}; its config asks for "
            f"{expected}"
        )


def _apply(step: Step, tensors: list[Tensor], *, ours: bool) -> list[Tensor]:
    names = step.theirs if ours else step.ours
    dtypes = {tensor.dtype for tensor in tensors}
    if len(dtypes) > 1:
        raise ConversionError(f"{', '.join(names)} are joined but differ in dtype: {dtypes}")
    try:
        transform = step.transform
        if ours:
            return transform.to_ours(tensors, step.sizes)
        return transform.to_theirs(tensors, step.sizes)
    except (ValueError, IndexError, RuntimeError) as error:
        raise ConversionError(
            f"{_described(names, tensors)} do not fit the config: {error}"
        ) from error


def _described(names: Sequence[str], tensors: Sequence[Tensor]) -> str:
    pairs = zip(names, tensors, strict=True)
    return ", ".join(f"`{name}` {tuple(tensor.shape)}" for name, tensor in pairs)


def _check_equal(source: ModelDirectory, copy: str, of: str) -> None:
    same = source.shape(copy) == source.shape(of) and source.dtype(copy) == source.dtype(of)
    rows = source.shape(of)[0] if source.shape(of) else 0
    for start in range(0, rows if same else 0, _ROWS):
        region = (slice(start, min(start + _ROWS, rows)),)
        same = same and torch.equal(source.tensor(copy, region), source.tensor(of, region))
    if not same:
        raise ConversionError(
            f"the config of `{source.path}` ties the output layer to the embedding, but `{copy}` "
            f"differs from `{of}`; set `tie_word_embeddings` to false if the model was untied"
        )
