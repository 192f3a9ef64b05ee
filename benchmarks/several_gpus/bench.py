"""What the parts share: settings, the folder they work in, and results kept after each run."""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from several_gpus.cases import Case, write_language
from several_gpus.layouts import LAYOUTS, ONE, run_file
from several_gpus.runs import Budget, OutOfTimeError, Run, RunFailedError, Starter


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """A case, and how it is run."""

    case: Case
    steps: int
    warmup: int
    """Steps whose speed does not count."""
    dtype: str
    compiled: bool
    is_cuda: bool
    folder: Path
    """For data and runs."""
    file: Path
    """Results: kept after each run, and not made again if they are there."""
    starter: Starter
    skipped: list[str]
    """What time did not allow."""

    @property
    def budget(self) -> Budget:
        return self.starter.budget

    @property
    def settings(self) -> dict[str, Any]:
        """What results depend on beside their name."""
        return {
            "tokens": self.case.tokens,
            "steps": self.steps,
            "dtype": self.dtype,
            "torch_compile": self.compiled,
            "cuda": self.is_cuda,
        }

    def run(
        self,
        name: str,
        part: str,
        *,
        layout: str | None = None,
        rows: int | None = None,
        changes: Mapping[str, Any] | None = None,
    ) -> Run:
        """Train a layout.

        Args:
            name: Of the run's folder, which is removed before.
            part: Of this script.
            layout: `None`: the one called `name`.
            rows: Sequences of a step, if not the case's.
            changes: Of settings, by `section.key`.
        """
        folder = self.folder / self.case.name / part / name
        shutil.rmtree(folder, ignore_errors=True)
        return self.go_on(folder, layout or name, rows=rows, changes=changes)

    def go_on(
        self,
        folder: Path,
        layout: str,
        *,
        rows: int | None = None,
        changes: Mapping[str, Any] | None = None,
    ) -> Run:
        """Train a layout in a folder, from where a run there stopped."""
        content = self.content(folder, layout, rows=rows)
        for key, value in (changes or {}).items():
            section, _, setting = key.partition(".")
            content[section][setting] = value
        # Raises where nothing is left.
        self.budget.left()
        print(f"{self.case.name}: {folder.parent.name}, {folder.name} ...", flush=True)
        return self.starter.train(content, LAYOUTS[layout].processes)

    def content(self, folder: Path, layout: str, *, rows: int | None = None) -> dict[str, Any]:
        """Return the run file of a layout, and write the tokens that it names."""
        data = self.folder / self.case.name / "data" / "language"
        write_language(data, self.case, self.steps)
        return run_file(
            self.case,
            LAYOUTS[layout],
            data=data,
            folder=folder,
            steps=self.steps,
            dtype=self.dtype,
            compiled=self.compiled,
            rows=rows,
        )

    def kept(self, part: str, name: str) -> dict[str, Any] | None:
        """Return a result that is there and was made with the same settings."""
        found = self.results().get(self.case.name, {}).get(part, {}).get(name)
        is_same = found is not None and found["settings"] == self.settings
        return found if is_same else None

    def results(self) -> dict[str, Any]:
        """Return everything that was kept."""
        return read_results(self.file)

    def keep(self, part: str, name: str, result: dict[str, Any]) -> None:
        """Write a result down."""
        results = self.results()
        parts = results.setdefault(self.case.name, {}).setdefault(part, {})
        parts[name] = {**result, "settings": self.settings}
        write_results(self.file, results)

    def attempt(self, part: str, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return a result that is there, or make and keep it; failures are results too.

        Args:
            part: Of this script.
            name: Of the result.
            make: Returns it; called without arguments.
        """
        found = self.kept(part, name)
        if found is not None and "failed" not in found:
            return found
        try:
            result = make()
        except OutOfTimeError as error:
            self.skipped.append(f"{self.case.name}, {part}, {name}: {error}")
            return {"failed": str(error)}
        except RunFailedError as error:
            result = {"failed": str(error)}
        self.keep(part, name, result)
        return result

    def one(self) -> dict[str, Any]:
        """Return the run on one GPU that others are compared with."""
        return self.layout(ONE)

    def layout(self, name: str) -> dict[str, Any]:
        """Return the numbers of a layout."""
        return self.attempt("layouts", name, lambda: self._measure(name))

    def _measure(self, name: str) -> dict[str, Any]:
        numbers = self.run(name, "layouts").numbers(self.warmup)
        shutil.rmtree(self.folder / self.case.name / "layouts" / name)
        return numbers


def read_results(file: Path) -> dict[str, Any]:
    """Read the file of results; nothing where there is none."""
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def write_results(file: Path, results: dict[str, Any]) -> None:
    """Replace the file of results."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    partial.replace(file)
