"""Part `resume`: what one number of GPUs saved another continues; what a save costs a run."""

import re
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from several_gpus.bench import Bench
from several_gpus.comparing import compare
from several_gpus.layouts import LAYOUTS, ONE
from several_gpus.runs import Run, RunFailedError

# What saves, what continues.
MOVES = {
    "two-one": ("fsdp2", ONE),
    "one-two": (ONE, "fsdp2"),
    "tp-fsdp2": ("tp", "fsdp2"),
}
ASYNC = "async"
WAYS = (*MOVES, ASYNC)
DEFAULT_WAYS = ["two-one", "one-two", ASYNC]
TITLES = (
    "saved by",
    "continued by",
    "steps before, in all",
    "save s",
    "GiB",
    "apart before",
    "apart after",
    "first step after",
    "equal",
)
ASYNC_TITLES = (
    "save at step",
    "stall s",
    "stall to COMMIT s",
    "steps meanwhile",
    "ms a step else",
    "ms a step meanwhile",
)


def measure_resume(bench: Bench, steps: int, ways: list[str]) -> None:
    """Save in one layout and continue in another, and compare with one GPU all the way.

    Args:
        bench: What is run.
        steps: Of the whole run, half of them before it is moved; at most the bench's own.
        ways: Of `WAYS`.
    """
    bench.one()
    for way in ways:
        make = _saved_meanwhile(bench) if way == ASYNC else _moved(bench, way, steps)
        bench.attempt("resume", way, make)


def _moved(bench: Bench, way: str, steps: int) -> Callable[[], dict[str, Any]]:
    before, after = MOVES[way]
    steps = min(steps, bench.steps)
    cut = steps // 2

    def make() -> dict[str, Any]:
        changes = {
            "save_args.save_optimizer": True,
            "training_parameters.num_training_steps": cut,
        }
        first = bench.run(way, "resume", layout=before, changes=changes)
        folder = bench.folder / bench.case.name / "resume" / way
        size = _bytes(folder)
        changes["training_parameters.num_training_steps"] = steps
        # The whole is saved before; what follows is only trained.
        changes["save_args.save_optimizer"] = False
        second = bench.go_on(folder, after, changes=changes)
        if f"checkpoint restored: path={folder}/global_step{cut}" not in second.log:
            raise RunFailedError(f"the run did not start from step {cut}")
        shutil.rmtree(folder)
        return {
            "from": before,
            "to": after,
            "cut": cut,
            "steps": steps,
            "save_seconds": _saves(first)[-1][1],
            "bytes": size,
            "before": first.losses,
            "after": {step: each for step, each in second.losses.items() if step > cut},
            "continue_seconds": second.seconds,
        }

    return make


def _saved_meanwhile(bench: Bench) -> Callable[[], dict[str, Any]]:
    interval = max(1, bench.steps // 2)

    def make() -> dict[str, Any]:
        changes = {
            "save_args.save_optimizer": True,
            "save_args.async_checkpointing": True,
            "save_args.keep_last": 1,
            "save_args.save_interval": interval,
        }
        run = bench.run(ASYNC, "resume", layout="fsdp2", changes=changes)
        shutil.rmtree(bench.folder / bench.case.name / "resume" / ASYNC)
        return {"saves": _stalls(run, bench.warmup)}

    return make


def _stalls(run: Run, warmup: int) -> list[dict[str, Any]]:
    """Read saves from the log, whose lines come in the order in which things happened."""
    seconds = {each["step"]: each["step_seconds"] for each in run.records}
    saves: list[dict[str, Any]] = []
    meanwhile: set[int] = set()
    step = 0
    for line in run.log.splitlines():
        if found := re.search(r"\bstep ([\d,]+)/", line):
            step = int(found[1].replace(",", ""))
            if saves and "commit_seconds" not in saves[-1]:
                saves[-1]["meanwhile"].append(step)
                meanwhile.add(step)
        elif found := re.search(r"checkpoint copied: step=(\d+) seconds=([\d.]+)", line):
            saves.append({"step": int(found[1]), "stall_seconds": float(found[2]), "meanwhile": []})
        elif found := re.search(r"checkpoint saved: step=(\d+) seconds=([\d.]+)", line):
            saves[-1]["commit_seconds"] = float(found[2]) - saves[-1]["stall_seconds"]
    usual = [each for at, each in seconds.items() if at > warmup and at not in meanwhile]
    for save in saves:
        slowed = [seconds[at] for at in save["meanwhile"] if at in seconds]
        save["usual_step_seconds"] = statistics.median(usual or seconds.values())
        save["step_seconds"] = statistics.median(slowed) if slowed else None
    return saves


def _saves(run: Run) -> list[tuple[int, float]]:
    """Steps and seconds of the saves that the log tells of."""
    found = re.findall(r"checkpoint saved: step=(\d+) seconds=([\d.]+)", run.log)
    if not found:
        raise RunFailedError("the log tells of no save")
    return [(int(step), float(seconds)) for step, seconds in found]


def _bytes(folder: Path) -> int:
    files = (each for root in folder.glob("global_step*") for each in root.rglob("*"))
    return sum(each.stat().st_size for each in files if each.is_file())


def resume_rows(
    results: dict[str, Any], reference: dict[str, Any], limit: float | None
) -> list[list[str]]:
    """Return the rows of a table of moved runs.

    Args:
        results: Of the part `resume`.
        reference: The run on one GPU, which was not interrupted.
        limit: Relative difference of losses that noise explains; `None` if not known.
    """
    rows = []
    for way, names in MOVES.items():
        each, titles = results.get(way), [LAYOUTS[name].title for name in names]
        if each is None:
            continue
        if "failed" in each:
            rows.append([*titles, f"failed: {each['failed'][:160]}"])
            continue
        row = [
            *titles,
            f"{each['cut']}, {each['steps']}",
            f"{each['save_seconds']:.2f}",
            f"{each['bytes'] / 2**30:.2f}",
        ]
        losses = reference.get("losses", {})
        before, after = (compare(each[when], losses) for when in ("before", "after"))
        if before is not None and after is not None:
            row += [f"{number:.1e}" for number in (before.largest, after.largest, after.first)]
            if limit is not None:
                row.append("yes" if max(before.largest, after.largest) <= limit else "NO")
        rows.append(row)
    return rows


def async_rows(results: dict[str, Any]) -> list[list[str]]:
    """Return the rows of a table of asynchronous saves."""
    found = results.get(ASYNC, {})
    if "failed" in found:
        return [[f"{LAYOUTS['fsdp2'].title}: failed: {found['failed'][:160]}"]]
    rows = []
    for each in found.get("saves", []):
        slowed = each["step_seconds"]
        rows.append(
            [
                str(each["step"]),
                f"{each['stall_seconds']:.3f}",
                f"{each.get('commit_seconds', float('nan')):.2f}",
                str(len(each["meanwhile"])),
                f"{1e3 * each['usual_step_seconds']:.1f}",
                "" if slowed is None else f"{1e3 * slowed:.1f}",
            ]
        )
    return rows
