"""The run file, key by key, as Markdown made from the sections themselves."""

from collections.abc import Iterator, Mapping
from typing import Any

from lme_cli.json_schema import describe

Schema = Mapping[str, Any]
"""A part of a JSON schema; its values differ by key."""

_HEAD = """# The run file, key by key

Made by `lme config schema --markdown`; do not edit. Settings without a default are required.
"""


def render() -> str:
    """Write one chapter a section, and one for each class of settings below it."""
    schema = describe()
    lines = [_HEAD]
    for name, section in schema["properties"].items():
        names = list(dict.fromkeys(_classes(section, schema)))
        described = section.get("description") or _class(schema, names[0]).get("description", "")
        lines.append(f"## `{name}`\n\n{described}\n")
        seen: set[str] = set()
        for each in names:
            lines += _chapter(each, schema, seen, is_only=len(names) == 1)
    return "\n".join(lines).rstrip() + "\n"


def _chapter(name: str, schema: Schema, seen: set[str], *, is_only: bool) -> Iterator[str]:
    """Write a class's settings, then those of the classes they hold."""
    if name in seen:
        return
    seen.add(name)
    described = _class(schema, name)
    if not is_only:
        yield f"### {name}\n\n{described.get('description', '').strip()}\n"
    required = set(described.get("required", ()))
    yield "| key | type | default | meaning |\n| --- | --- | --- | --- |"
    inner: list[str] = []
    for key, setting in described.get("properties", {}).items():
        classes = _classes(setting, schema)
        inner += classes
        default = "" if key in required else _code(setting.get("default", "" if classes else None))
        meaning = " ".join(setting.get("description", "").split()).replace("|", "\\|")
        yield f"| `{key}` | {_type(setting)} | {default} | {meaning} |"
    yield ""
    for each in dict.fromkeys(inner):
        yield from _chapter(each, schema, seen, is_only=False)


def _classes(setting: Schema, schema: Schema) -> list[str]:
    """Give the classes a setting may hold, in order."""
    found: list[str] = []
    if "$ref" in setting:
        name = setting["$ref"].rpartition("/")[2]
        if "properties" in _class(schema, name):
            found.append(name)
    for key in ("anyOf", "oneOf", "allOf"):
        for each in setting.get(key, ()):
            found += _classes(each, schema)
    if isinstance(setting.get("items"), Mapping):
        found += _classes(setting["items"], schema)
    return found


def _type(setting: Schema) -> str:
    if "$ref" in setting:
        return str(setting["$ref"]).rpartition("/")[2]
    for key in ("anyOf", "oneOf", "allOf"):
        if key in setting:
            return " or ".join(dict.fromkeys(_type(each) for each in setting[key]))
    if "const" in setting:
        return _code(setting["const"])
    if "enum" in setting:
        return ", ".join(_code(each) for each in setting["enum"])
    kind = str(setting.get("type", "any"))
    if kind == "array":
        items = setting.get("items") or (setting.get("prefixItems") or [{}])[0]
        return f"list of {_type(items)}"
    return {"integer": "whole number", "object": "mapping"}.get(kind, kind)


def _class(schema: Schema, name: str) -> Schema:
    return schema["$defs"][name]


def _code(value: object) -> str:
    if value == "":
        return ""
    if value is None or isinstance(value, bool):
        return f"`{str(value).lower()}`".replace("none", "null")
    return f"`{value}`"
