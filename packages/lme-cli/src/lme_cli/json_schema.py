"""The JSON schema of run files, with every setting's own description."""

import ast
import inspect
import itertools
import textwrap
from collections.abc import Iterator
from typing import Any

from lme_cli.config import RunConfig
from lme_cli.schema import fields, items, section_classes


def describe() -> dict[str, Any]:
    """Give the schema; settings that a class inherits are described by their own class's words."""
    schema = RunConfig.model_json_schema()
    classes = {each.__name__: each for each in _reachable(RunConfig, set())}
    for name, definition in schema["$defs"].items():
        if name not in classes:
            continue
        known = _docstrings(classes[name])
        for key, setting in definition.get("properties", {}).items():
            if "description" not in setting and key in known:
                setting["description"] = known[key]
    return schema


def _reachable(hint: Any, seen: set[type]) -> Iterator[type]:  # type forms have no common type
    for kind in section_classes(hint):
        if kind in seen:
            continue
        seen.add(kind)
        yield kind
        for inner in fields(kind).values():
            yield from _reachable(inner, seen)
    for inner in items(hint):
        yield from _reachable(inner, seen)


def _docstrings(kind: type) -> dict[str, str]:
    """Read the text under each field of a class and of those it inherits from."""
    found: dict[str, str] = {}
    for each in reversed(kind.__mro__):
        if each.__module__.startswith("lme_"):
            (tree,) = ast.parse(textwrap.dedent(inspect.getsource(each))).body
            body = tree.body if isinstance(tree, ast.ClassDef) else []
            for before, after in itertools.pairwise(body):
                if not (isinstance(before, ast.AnnAssign) and isinstance(before.target, ast.Name)):
                    continue
                if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                    found[before.target.id] = inspect.cleandoc(str(after.value.value))
    return found
