"""Everything that is known, as Markdown."""

import os
import platform
from collections.abc import Sequence
from typing import Any

import torch
from several_gpus import equality, hang, resume, scaling, struck
from several_gpus.cases import CASES


def report(
    results: dict[str, Any], command: Sequence[str], device: str, skipped: Sequence[str]
) -> str:
    """Write all results down.

    Args:
        results: Of this call and those before.
        command: Arguments of this call.
        device: `cuda` or `cpu`.
        skipped: What this call did not come to.
    """
    where = f"{os.cpu_count()} CPU cores"
    if device == "cuda":
        names = [torch.cuda.get_device_name(each) for each in range(torch.cuda.device_count())]
        where = f"{' and '.join(names)}, {where}, CUDA {torch.version.cuda}"
    said = [
        "# Two GPUs against one\n",
        f"{where}, torch {torch.__version__}, Python {platform.python_version()}.\n",
        f"```\npython benchmarks/two_gpus.py {' '.join(command)}\n```\n",
    ]
    for name in CASES:
        if name in results:
            said += _case(name, results[name])
    if "hang" in results:
        said += ["## Hangs\n", table(hang.TITLES, hang.hang_rows(results["hang"]))]
        said.append(
            "Of two that disagree about a collective both may be named: nothing tells who is wrong."
            " `as on CPU`: those who are blamed are blamed in the same words.\n"
        )
    if skipped:
        said += ["## Not run\n", *(f"- {each}" for each in skipped), ""]
    return "\n".join(said)


def _case(name: str, results: dict[str, Any]) -> list[str]:
    case, layouts = CASES[name], results.get("layouts", {})
    said = [f"## {name}: {case.rows} sequences of {case.sequence} tokens a step\n"]
    if layouts:
        said += ["### Layouts\n", table(equality.TITLES, equality.layout_rows(layouts))]
        said += [
            "`apart`: relative difference of the loss from that of one GPU at the same step;"
            " `most`: the largest of all steps. Speed is the median after the warm-up. Each step"
            " is waited for, since its loss is read.\n",
            equality.bound_text(layouts),
        ]
    if "scaling" in results:
        rows = scaling.scaling_rows(results["scaling"])
        said += ["### Scaling\n", table(scaling.TITLES, rows)]
        said.append(f"Wanted: {scaling.WANTED} times one GPU. Losses are read now and then only.\n")
    if "traces" in results:
        said.append(table(scaling.TRACE_TITLES, scaling.trace_rows(results["traces"])))
        said.append("Shares of the time from the first to the last kernel of one step of rank 0.\n")
        said += scaling.kernel_tables(results["traces"])
    if "resume" in results:
        one, limit = layouts.get("one", {}), equality.bound(layouts)
        said += [
            "### Resuming\n",
            table(resume.TITLES, resume.resume_rows(results["resume"], one, limit)),
        ]
    if resume.ASYNC in results.get("resume", {}):
        said += [
            "Asynchronous saves of FSDP2:\n",
            table(resume.ASYNC_TITLES, resume.async_rows(results["resume"])),
        ]
    if "struck" in results:
        rows = struck.struck_rows(results["struck"])
        said += ["### A process of `lme train` that is struck\n", table(struck.TITLES, rows)]
    return said


def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Write a Markdown table; short rows are filled up."""
    lines = [list(titles), ["---"] * len(titles)]
    lines += [[*row, *[""] * (len(titles) - len(row))] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
