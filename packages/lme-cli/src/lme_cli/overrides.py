"""`--set section.key=value`: one value of a run file replaced from the command line."""

import copy
from collections.abc import Sequence
from typing import Any

from lme_cli.problems import Path, Place, Problem, RunFileError, dotted
from lme_cli.run_file import RunFile, parse_value

SET = Place("--set")


def apply_overrides(run_file: RunFile, settings: Sequence[str]) -> RunFile:
    """Give `run_file` with each `a.b.c=value` of `settings` applied, in order.

    A part of the path that is a number is a position in a list; the position one past the end
    appends. Mappings that do not exist yet are made. The value is read as YAML, so `3e-4` is a
    number, `null` is null and `[1, 2]` is a list.

    Raises:
        RunFileError: If a setting has no `=`, its value is not YAML, or its path goes through
            a value that has no parts.
    """
    values = copy.deepcopy(run_file.values)
    places = dict(run_file.places)
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals or not name.strip():
            message = f"`--set {setting}` is not of the form section.key=value"
            raise RunFileError([Problem(message, place=SET)])
        path = _path(name.strip())
        value = parse_value(text, name=f"--set {name.strip()}")
        _replace(values, path, value)
        for known in [each for each in places if each[: len(path)] == path]:
            del places[known]
        for each in _paths(value, path):
            places[each] = SET
    notes = "".join(f"# --set {setting}\n" for setting in settings)
    return RunFile(run_file.name, values, places, run_file.text.rstrip("\n") + "\n" + notes)


def _path(name: str) -> Path:
    return tuple(int(part) if part.isdecimal() else part for part in name.split("."))


def _replace(values: dict[str, Any], path: Path, value: object) -> None:
    here: Any = values
    for depth, part in enumerate(path):
        last = depth + 1 == len(path)
        if isinstance(here, list):
            here = _step_into_list(here, path, depth, value, last=last)
            continue
        if not isinstance(here, dict):
            message = f"cannot be set: `{dotted(path[:depth])}` is {here!r}, which has no parts"
            raise RunFileError([Problem(message, path, SET)])
        key = str(part)
        if last:
            here[key] = value
        else:
            if here.get(key) is None:
                here[key] = [] if isinstance(path[depth + 1], int) else {}
            here = here[key]


def _step_into_list(here: list[Any], path: Path, depth: int, value: object, *, last: bool) -> Any:
    part = path[depth]
    if not isinstance(part, int) or part > len(here):
        length = len(here)
        message = f"cannot be set: `{dotted(path[:depth])}` is a list of {length}, got `{part}`"
        remedy = f"use a position from 0 to {length}"
        raise RunFileError([Problem(message, path, SET, remedy)])
    if part == len(here):
        here.append(None if last else {})
    if last:
        here[part] = value
    return here[part]


def _paths(value: object, path: Path) -> list[Path]:
    found = [path]
    if isinstance(value, dict):
        for key, each in value.items():
            found += _paths(each, (*path, str(key)))
    if isinstance(value, list):
        for index, each in enumerate(value):
            found += _paths(each, (*path, index))
    return found
