"""The settings a run file may hold, read from the types of its sections."""

import dataclasses
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel

from lme_cli.problems import Path

Hint = Any
"""A type as annotated; `Any` because type forms have no common type."""


@cache
def fields(kind: type) -> Mapping[str, Hint]:
    """Give the settings of a section class with their types; empty for any other class."""
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind, include_extras=True)
        return {each.name: hints[each.name] for each in dataclasses.fields(kind) if each.init}
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return typing.get_type_hints(kind, include_extras=True) | {}
    return {}


def section_classes(hint: Hint) -> list[type]:
    """Give the section classes that a value of this type may be."""
    return [each for each in _alternatives(hint) if fields(each)]


def classes_at(root: type, path: Path, values: object) -> list[type]:
    """Give the section classes that the value at `path` may be.

    Args:
        root: Class of the whole run file.
        path: Keys and list positions; all but the last may be assumed to exist in `values`.
        values: The file's values. Where a setting chooses among classes (`class_name`,
            `model_type`, ...), those it does not choose are left out.
    """
    hints: list[Hint] = [root]
    here = values
    for part in path:
        classes = _chosen([each for hint in hints for each in section_classes(hint)], here)
        found = [fields(each)[str(part)] for each in classes if part in fields(each)]
        found += [item for hint in hints for item in items(hint)] if not found else []
        hints = found
        here = _part(here, part)
    return _chosen([each for hint in hints for each in section_classes(hint)], here)


@cache
def homes(root: type) -> Mapping[str, Sequence[Path]]:
    """Give every setting's name with the sections that have it; `0` stands for a list position."""
    found: dict[str, list[Path]] = {}
    for path in _walk(root, (), ()):
        name = path[-1]
        if isinstance(name, str) and path[:-1] not in found.setdefault(name, []):
            found[name].append(path[:-1])
    return found


def _walk(hint: Hint, path: Path, above: tuple[type, ...]) -> Iterator[Path]:
    for kind in section_classes(hint):
        if kind in above:
            continue
        for name, inner in fields(kind).items():
            yield (*path, name)
            yield from _walk(inner, (*path, name), (*above, kind))
    for item in items(hint):
        yield from _walk(item, (*path, 0), above)


def _alternatives(hint: Hint) -> Iterator[Hint]:
    """Take unions, annotations and type variables apart."""
    origin = typing.get_origin(hint)
    if origin is Annotated:
        yield from _alternatives(typing.get_args(hint)[0])
    elif origin in (types.UnionType, typing.Union):
        for each in typing.get_args(hint):
            yield from _alternatives(each)
    elif isinstance(hint, TypeVar):
        yield from _alternatives(hint.__bound__)
    elif hasattr(hint, "__value__"):
        yield from _alternatives(hint.__value__)
    else:
        yield hint


def items(hint: Hint) -> Iterator[Hint]:
    """Give the types of a list's items; nothing for any other type."""
    for each in _alternatives(hint):
        if typing.get_origin(each) in (list, tuple, Sequence, set, frozenset):
            yield from (item for item in typing.get_args(each) if item is not Ellipsis)


def _chosen(classes: list[type], value: object) -> list[type]:
    if not isinstance(value, Mapping):
        return classes
    return [each for each in classes if _admits(each, value)] or classes


def _admits(kind: type, value: Mapping[str, object]) -> bool:
    """Say whether a class's fixed settings (a `Literal` of one) agree with the values given."""
    for name, hint in fields(kind).items():
        allowed = literals(hint)
        if len(allowed) == 1 and name in value and value[name] != allowed[0]:
            return False
    return True


def literals(hint: Hint) -> list[object]:
    """Give the fixed values a setting of this type may have; empty where it is open."""
    found: list[object] = []
    for each in _alternatives(hint):
        if typing.get_origin(each) is Literal:
            found += typing.get_args(each)
    return found


def _part(value: object, part: str | int) -> object:
    if isinstance(value, Mapping) and isinstance(part, str):
        return value.get(part)
    if isinstance(value, list) and isinstance(part, int) and part < len(value):
        return value[part]
    return None
