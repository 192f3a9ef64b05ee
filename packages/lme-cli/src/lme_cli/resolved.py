"""A run with every default filled in, as plain values, and where each value comes from."""

import json
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from lme_cli.problems import Path
from lme_cli.run_file import RunFile

Plain = Any
"""None, bool, int, float, str, or lists and string-keyed dicts of these."""


def resolve(run: BaseModel) -> dict[str, Plain]:
    """Give every setting of a run as plain values, defaults included."""
    return run.model_dump(mode="json")


def show(run: BaseModel, run_file: RunFile) -> str:
    """Write a run as YAML, with the origin of each value behind it.

    Origins are the file and line, `--set`, or `default`.
    """
    lines: list[tuple[str, str]] = []
    _write(resolve(run), (), run_file, lines)
    width = min(max((len(text) for text, origin in lines if origin), default=0), 64)
    return "\n".join(f"{text:<{width}}  # {origin}" if origin else text for text, origin in lines)


def _write(
    value: Plain,
    path: Path,
    run_file: RunFile,
    lines: list[tuple[str, str]],
) -> None:
    items = value.items() if isinstance(value, Mapping) else enumerate(value)
    for key, each in items:
        inner = (*path, key)
        listed = isinstance(key, int)
        indent = "  " * len(path)
        head = f"{indent}-" if listed else f"{indent}{key}:"
        if isinstance(each, Mapping | list) and each and not _is_flat(each):
            lines.append((head, ""))
            _write(each, inner, run_file, lines)
        else:
            lines.append((f"{head} {_scalar(each)}", _origin(inner, run_file)))


def _is_flat(value: Plain) -> bool:
    """Say whether a value is a short list of numbers or words, written in one line."""
    return (
        isinstance(value, list)
        and len(value) <= 8
        and not any(isinstance(each, Mapping | list) for each in value)
    )


def _scalar(value: Plain) -> str:
    # JSON is YAML, except that YAML spells what is not finite in its own way.
    text = json.dumps(value, ensure_ascii=False)
    for ours, theirs in (("-Infinity", "-.inf"), ("Infinity", ".inf"), ("NaN", ".nan")):
        text = text.replace(ours, theirs) if not isinstance(value, str) else text
    return text


def _origin(path: Path, run_file: RunFile) -> str:
    place = run_file.places.get(path)
    if place is None:
        return "default"
    return f"{place.file}:{place.line}" if place.line else place.file
