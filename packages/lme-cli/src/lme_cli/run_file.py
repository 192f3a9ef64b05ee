"""Run files: YAML read strictly, with the place of every key and value kept.

Numbers follow YAML 1.2: `3e-4` is a float, `010` is ten, `0o10` is eight, and `12:30` and dates
are strings (YAML 1.1 reads the former as 750 in base sixty). Underscores in numbers are allowed.
Booleans keep YAML 1.1's spellings (`yes`, `off`, ...). A key given twice is an error. Anchors,
aliases and merge keys (`<<`) are allowed within limits.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import Any

import yaml

from lme_cli.problems import Path, Place, Problem, RunFileError

MAX_DEPTH = 64
"""Levels of nesting, aliases followed."""
MAX_NODES = 200_000
"""Values in a file, those under an alias counted each time it is used."""

_FLOAT = re.compile(
    r"""[-+]?(?:[0-9][0-9_]*)?\.[0-9_]+(?:[eE][-+]?[0-9]+)?$
    |[-+]?[0-9][0-9_]*(?:\.[0-9_]*)?[eE][-+]?[0-9]+$
    |[-+]?[0-9][0-9_]*\.$
    |[-+]?\.(?:inf|Inf|INF)$
    |\.(?:nan|NaN|NAN)$""",
    re.VERBOSE,
)
_INT = re.compile(r"[-+]?[0-9][0-9_]*$|[-+]?0o[0-7_]+$|[-+]?0x[0-9a-fA-F_]+$")


@dataclass(frozen=True, slots=True)
class RunFile:
    """A file's values as plain Python, and where each of them stands."""

    name: str
    """The file as the user named it."""
    values: dict[str, Any]
    """The whole file; mappings are dicts, sequences are lists."""
    places: Mapping[Path, Place] = field(default_factory=dict)
    """Place of each key (of a list item: of the item), by path."""
    text: str = ""
    """The file as it was written, with a comment for each setting replaced since."""

    def place(self, path: Path) -> Place | None:
        """Give the place of `path`, or of the nearest thing around it that was written."""
        for length in range(len(path), -1, -1):
            if (found := self.places.get(path[:length])) is not None:
                return found
        return None


def load(path: str | FilePath, *, name: str | None = None) -> RunFile:
    """Read a run file.

    Args:
        path: The file.
        name: What to call it in messages; `path` as given if `None`.

    Returns:
        Values and places; nothing is checked against any schema.

    Raises:
        RunFileError: If it cannot be read, is not YAML, repeats a key, passes a limit, or is not
            a mapping at the top.
    """
    shown = name or str(path)
    try:
        text = FilePath(path).read_text(encoding="utf-8")
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise RunFileError([Problem(f"cannot read run file `{shown}`: {reason}")]) from error
    except UnicodeDecodeError as error:
        message = f"run file `{shown}` is not UTF-8 text (byte {error.start})"
        raise RunFileError([Problem(message)]) from error
    return parse(text, name=shown)


def parse(text: str, *, name: str) -> RunFile:
    """Read a run file from a string; see `load`."""
    node = _compose(text, name)
    if node is None:
        return RunFile(name, {}, {(): Place(name, 1, 1)}, text)
    builder = _Builder(name)
    values = builder.build(node, ())
    if not isinstance(values, dict):
        message = f"a run file is a mapping of sections, got a {_kind(values)}"
        raise RunFileError([Problem(message, place=_place(name, node))])
    if builder.problems:
        raise RunFileError(builder.problems)
    return RunFile(name, values, builder.places, text)


def parse_value(text: str, *, name: str) -> Any:
    """Read one YAML value, as on the right of `--set section.key=value`.

    Raises:
        RunFileError: If `text` is not YAML.
    """
    node = _compose(text, name)
    if node is None:
        return None
    builder = _Builder(name)
    value = builder.build(node, ())
    if builder.problems:
        raise RunFileError(builder.problems)
    return value


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2 numbers and without dates."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 - the name and form are PyYAML's


def _integer(loader: yaml.SafeLoader, node: yaml.Node) -> int:
    text = str(node.value).replace("_", "")
    digits = text.lstrip("+-").lower()
    base = 8 if digits.startswith("0o") else 16 if digits.startswith("0x") else 10
    number = int(digits[2:] if base != 10 else digits, base)
    return -number if text.startswith("-") else number


def _floating(loader: yaml.SafeLoader, node: yaml.Node) -> float:
    text = str(node.value).replace("_", "").lower()
    return float(text.replace(".", "") if text.endswith(("inf", "nan")) else text)


def _resolvers() -> Iterator[tuple[str, re.Pattern[str], list[str]]]:
    core = "tag:yaml.org,2002:"
    yield (
        core + "bool",
        re.compile(
            r"(?:yes|Yes|YES|no|No|NO|true|True|TRUE|false|False|FALSE"
            r"|on|On|ON|off|Off|OFF)$"
        ),
        list("yYnNtTfFoO"),
    )
    yield core + "int", _INT, list("-+0123456789")
    yield core + "float", _FLOAT, list("-+0123456789.")
    yield core + "null", re.compile(r"(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]
    yield core + "merge", re.compile(r"<<$"), ["<"]


for _tag, _pattern, _first in _resolvers():
    _Loader.add_implicit_resolver(_tag, _pattern, _first)
_Loader.add_constructor("tag:yaml.org,2002:int", _integer)
_Loader.add_constructor("tag:yaml.org,2002:float", _floating)


def _compose(text: str, name: str) -> yaml.Node | None:
    """Parse to a graph of nodes, which still knows its lines."""
    loader = None
    try:
        loader = _Loader(text)
        return loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = Place(name, mark.line + 1, mark.column + 1) if mark else Place(name)
        message = f"not valid YAML: {error.problem or error.context}"
        remedy = _yaml_remedy(message)
        raise RunFileError([Problem(message, place=place, remedy=remedy)]) from error
    except yaml.YAMLError as error:
        raise RunFileError([Problem(f"not valid YAML: {error}", place=Place(name))]) from error
    except RecursionError as error:
        message = f"nests deeper than {MAX_DEPTH} levels"
        raise RunFileError([Problem(message, place=Place(name))]) from error
    finally:
        if loader is not None:
            loader.dispose()


def _yaml_remedy(message: str) -> str | None:
    if "'\\t'" in message:
        return "indent with spaces, not tabs"
    if "mapping values are not allowed" in message:
        return "quote a value that holds `: `"
    return None


class _Builder:
    """Turns nodes into plain Python, checking keys and limits, keeping places."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.places: dict[Path, Place] = {}
        self.problems: list[Problem] = []
        self._nodes = 0
        self._scalars = _Loader("")

    def build(self, node: yaml.Node, path: Path) -> Any:
        self._count(node, path)
        self.places.setdefault(path, _place(self.name, node))
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            if node.tag != "tag:yaml.org,2002:seq":
                self._refuse_tag(node, path)
            return [self.build(each, (*path, index)) for index, each in enumerate(node.value)]
        return self._scalar(node, path)

    def _mapping(self, node: yaml.MappingNode, path: Path) -> dict[str, Any]:
        if node.tag != "tag:yaml.org,2002:map":
            self._refuse_tag(node, path)
        built: dict[str, Any] = {}
        merges: list[tuple[yaml.Node, yaml.Node]] = []
        first: dict[str, Place] = {}
        for key_node, value_node in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                merges.append((key_node, value_node))
                continue
            if not isinstance(key_node, yaml.ScalarNode):
                message = "has a key that is not a plain name"
                self.problems.append(Problem(message, path, _place(self.name, key_node)))
                continue
            key = str(key_node.value)
            place = _place(self.name, key_node)
            if key in built:
                message = f"is given twice, first in line {first[key].line}"
                self.problems.append(Problem(message, (*path, key), place, "keep one of them"))
                continue
            first[key] = place
            self.places[(*path, key)] = place
            built[key] = self.build(value_node, (*path, key))
        for key_node, value_node in merges:
            self._merge(built, key_node, value_node, path)
        return built

    def _merge(
        self, built: dict[str, Any], key_node: yaml.Node, value_node: yaml.Node, path: Path
    ) -> None:
        """Add the pairs of `<<: *anchor`; keys that stand in the mapping itself win."""
        bases = value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]
        for base in bases:
            if not isinstance(base, yaml.MappingNode):
                message = "`<<` takes a mapping or a list of mappings"
                self.problems.append(Problem(message, path, _place(self.name, key_node)))
                continue
            self._count(base, path)
            outer, self.places = self.places, {}
            merged = self._mapping(base, path)
            inner, self.places = self.places, outer
            for key, value in merged.items():
                if key in built:
                    continue
                built[key] = value
                prefix = (*path, key)
                for each, place in inner.items():
                    if each[: len(prefix)] == prefix:
                        self.places[each] = place

    def _scalar(self, node: yaml.Node, path: Path) -> Any:
        try:
            return self._scalars.construct_object(node, deep=True)
        except (yaml.YAMLError, ValueError):
            self._refuse_tag(node, path)
            return None

    def _refuse_tag(self, node: yaml.Node, path: Path) -> None:
        shown = node.tag.replace("tag:yaml.org,2002:", "!!")
        message = f"has a value with the tag `{shown}`, which means nothing here"
        remedy = "write plain numbers, strings, lists and mappings"
        self.problems.append(Problem(message, path, _place(self.name, node), remedy))

    def _count(self, node: yaml.Node, path: Path) -> None:
        self._nodes += 1
        if len(path) > MAX_DEPTH:
            message = f"nests deeper than {MAX_DEPTH} levels (an alias inside its own anchor?)"
            raise RunFileError([Problem(message, path[:4], _place(self.name, node))])
        if self._nodes > MAX_NODES:
            message = f"holds more than {MAX_NODES} values once its aliases are followed"
            raise RunFileError([Problem(message, path[:4], _place(self.name, node))])


def _place(name: str, node: yaml.Node) -> Place:
    return Place(name, node.start_mark.line + 1, node.start_mark.column + 1)


def _kind(value: object) -> str:
    return {list: "list", str: "string", type(None): "null"}.get(type(value), "number")
