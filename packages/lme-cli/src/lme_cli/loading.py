"""From a path and `--set` settings to a checked run: the steps in their order."""

import warnings
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any, cast

from pydantic import BaseModel, create_model

from lme_cli.checks import find_all
from lme_cli.config import RunConfig, UnshardConfig
from lme_cli.overrides import apply_overrides
from lme_cli.problems import Problem, RunFileError
from lme_cli.run_file import RunFile, load
from lme_cli.validation import validate
from lme_cli.vintages import modernise


@dataclass(frozen=True, slots=True)
class Loaded:
    """A run file that passed every check that needs no device and no data."""

    run: RunConfig
    """The sections; of a fragment, those not written are null."""
    run_file: RunFile
    """What was read, with the settings of `--set` and today's names."""
    warnings: Sequence[Problem]
    """What to tell the user."""
    missing: Sequence[str] = ()
    """Required sections that a fragment lacks."""


def load_run(
    path: str | FilePath,
    settings: Sequence[str] = (),
    *,
    world_size: int | None = None,
) -> Loaded:
    """Read a run file.

    Args:
        path: The file.
        settings: Each of the form `section.key=value`.
        world_size: Number of processes, where it is known.

    Raises:
        RunFileError: With every problem found.
    """
    return check_run(apply_overrides(load(path), settings), world_size=world_size)


def check_run(run_file: RunFile, *, world_size: int | None = None) -> Loaded:
    """Validate and check a run file that was read; see `load_run`."""
    modern, notes = modernise(run_file)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = validate(RunConfig, modern)
    notes += _as_problems(caught)
    return _cross_check(run, modern, notes, list(RunConfig.model_fields), (), world_size)


def check_fragment(run_file: RunFile) -> Loaded:
    """Validate and check the sections that are there.

    Raises:
        RunFileError: With every problem found; a missing section is none.
    """
    modern, notes = modernise(run_file)
    required = [name for name, each in RunConfig.model_fields.items() if each.is_required()]
    missing = [name for name in required if name not in modern.values]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = validate(_fragment_class(modern.values), modern, described_by=RunConfig)
    notes += _as_problems(caught)
    present = [name for name in RunConfig.model_fields if name in modern.values]
    # It has the fields of a RunConfig, except that those not written are null.
    return _cross_check(cast(RunConfig, run), modern, notes, present, missing, None)


def load_unshard(path: str | FilePath, settings: Sequence[str] = ()) -> UnshardConfig:
    """Read the run file of `lme unshard`.

    Raises:
        RunFileError: With every problem found.
    """
    return validate(UnshardConfig, apply_overrides(load(path), settings))


def is_unshard(run_file: RunFile) -> bool:
    """Say whether this is a file for `lme unshard` rather than for training."""
    return "unsharded_path" in run_file.values


def _cross_check(
    run: RunConfig,
    run_file: RunFile,
    notes: list[Problem],
    present: Sequence[str],
    missing: Sequence[str],
    world_size: int | None,
) -> Loaded:
    errors: list[Problem] = []
    for finding in find_all(run, present, world_size):
        place = run_file.place(finding.path)
        problem = Problem(finding.message, finding.path, place, finding.remedy or None)
        (notes if finding.is_warning else errors).append(problem)
    if errors:
        raise RunFileError(errors)
    return Loaded(run, run_file, notes, missing)


def _as_problems(caught: Sequence[warnings.WarningMessage]) -> list[Problem]:
    return [Problem(text) for text in dict.fromkeys(str(each.message) for each in caught)]


def _fragment_class(written: Collection[str]) -> type[BaseModel]:
    """Make a class with the sections that are written; the others are null."""
    # Values are pydantic's own field descriptions, whose types differ.
    fields: dict[str, Any] = {
        name: (field.annotation, ...) if name in written else (Any, None)
        for name, field in RunConfig.model_fields.items()
    }
    return create_model("Fragment", __config__=RunConfig.model_config, **fields)
