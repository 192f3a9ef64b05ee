"""Settings of older run files: renamed ones are moved, obsolete ones dropped, both with a warning.

Settings that the sections themselves accept without effect are not listed here; their own classes
warn.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lme_cli.problems import Path, Problem, dotted
from lme_cli.run_file import RunFile


@dataclass(frozen=True, slots=True)
class Rename:
    """A setting that has another name, or none any more."""

    pattern: str
    """Its old path; `*` stands for any one part."""
    name: str | None
    """Its new name in the same section; `None` drops it."""
    reason: str
    """What the warning says after the name."""


RENAMES: Sequence[Rename] = (
    Rename(
        "model_args.pretrained_config.use_cache", None, "caches are made by generation, on demand"
    ),
    Rename(
        "model_args.pretrained_config.architectures", None, "`model_type` decides the architecture"
    ),
    Rename("model_args.pretrained_config.transformers_version", None, "nothing depends on it"),
    Rename("model_args.pretrained_config.auto_map", None, "no code of a model is ever run"),
    Rename("model_args.pretrained_config.name_or_path", None, "nothing depends on it"),
    Rename("model_args.pretrained_config._name_or_path", None, "nothing depends on it"),
    Rename(
        "model_args.pretrained_config.mlp_blocks.*.use_interleaved_weights",
        None,
        "gate and up rows are always interleaved",
    ),
    Rename("model_args.model_class", None, "`model_type` decides the class"),
    Rename("distributed_args.fsdp_version", "fsdp_algorithm", "was renamed"),
    Rename("distributed_args.tensor_parallel_size", "tensor_parallel_world_size", "was renamed"),
    Rename(
        "distributed_args.pipeline_parallel_size", "pipeline_parallel_world_size", "was renamed"
    ),
    Rename("distributed_args.context_parallel_size", "context_parallel_world_size", "was renamed"),
)


def modernise(run_file: RunFile) -> tuple[RunFile, list[Problem]]:
    """Apply the renames.

    Args:
        run_file: What was read; it is left as it is.

    Returns:
        The file with today's names, and one warning for each setting that was moved or dropped. A
        setting whose new name is given too stays, so that validation refuses it.
    """
    values = copy.deepcopy(run_file.values)
    places = dict(run_file.places)
    warnings: list[Problem] = []
    for rename in RENAMES:
        for path in list(_matches(values, tuple(rename.pattern.split(".")), ())):
            parent = _at(values, path[:-1])
            old = str(path[-1])
            if rename.name is not None and rename.name in parent:
                continue
            value = parent.pop(old)
            remedy = "remove it"
            if rename.name is not None:
                parent[rename.name] = value
                _move(places, path, (*path[:-1], rename.name))
                remedy = f"write `{dotted((*path[:-1], rename.name))}`"
            place = run_file.place(path)
            message = rename.reason if rename.name else f"has no effect: {rename.reason}"
            warnings.append(Problem(message, path, place, remedy, rename.name))
    return replace(run_file, values=values, places=places), warnings


def _matches(value: Any, pattern: tuple[str, ...], path: Path) -> Iterator[Path]:
    """Give the paths in `value` (plain YAML values) that `pattern` describes."""
    if not pattern:
        yield path
        return
    first, rest = pattern[0], pattern[1:]
    if isinstance(value, dict):
        for key in [each for each in value if first in ("*", each)]:
            yield from _matches(value[key], rest, (*path, key))
    elif isinstance(value, list) and first == "*":
        for index, each in enumerate(value):
            yield from _matches(each, rest, (*path, index))


def _at(values: Any, path: Path) -> dict[str, Any]:
    for part in path:
        values = values[part]
    return values


def _move(places: dict[Path, Any], old: Path, new: Path) -> None:
    for path in [each for each in places if each[: len(old)] == old]:
        places[new + path[len(old) :]] = places.pop(path)
