"""The command line of `python -m lme_kernels.bench`."""

import argparse
import json
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from lme_kernels.bench.calls import Case, Draw
from lme_kernels.bench.ceilings import measure_ceilings
from lme_kernels.bench.families import measure_families
from lme_kernels.bench.first_call import measure_here, measure_in_processes
from lme_kernels.bench.measure import Results, Row, measure, results_of
from lme_kernels.bench.presets import PRESETS
from lme_kernels.bench.report import HEAD, line, write_json
from lme_kernels.bench.timing import OutOfTimeError, Stopwatch, limit
from lme_kernels.bench.variants import OPTIMIZERS, automatic_choice, build, variants_of

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line and measure.

    Args:
        arguments: What to read; `None` for the process's own.

    Returns:
        0; a row that failed is printed and is no failure of the program.
    """
    options = _parser().parse_args(arguments)
    device = torch.device(options.device)
    dtype = DTYPES[options.dtype or ("bfloat16" if device.type == "cuda" else "float32")]
    if options.first_call_of:
        preset, index, variant = options.first_call_of.split(":")
        case = PRESETS[preset][int(index)]
        print(json.dumps(measure_here(case, variant, device, dtype)))
        return 0
    preset = options.preset or ("full" if device.type == "cuda" else "small")
    chosen = [
        (index, case)
        for index, case in enumerate(PRESETS[preset])
        if options.ops is None or case.op in options.ops
    ]
    unknown = set(options.ops or ()) - {case.op for case in PRESETS[preset]}
    if unknown:
        known = ", ".join(dict.fromkeys(case.op for case in PRESETS[preset]))
        raise SystemExit(f"`--ops` has {', '.join(sorted(unknown))}; `{preset}` has {known}")
    if options.first_call:
        _first_calls(options, preset, chosen, device)
    elif options.op_seconds is not None:
        _measure_apart(options, preset, [case.op for _, case in chosen])
    else:
        _measure_all(options, preset, [case for _, case in chosen], device, dtype)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m lme_kernels.bench", description=__doc__)
    add = parser.add_argument
    add("--ops", nargs="+", help="names of ops; default: all of the preset")
    add("--preset", choices=list(PRESETS), help="default: full on a GPU, small elsewhere")
    add("--variants", nargs="+", help="code to measure: triton, cuda, torch, eager, compile, ...")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", choices=list(DTYPES), help="default: bfloat16 on a GPU, float32 elsewhere")
    add("--json", type=Path, help="file to write all numbers to, after every row")
    add("--budget-seconds", type=float, help="start no row after this long")
    add("--op-seconds", type=float, help="measure each op in a process of its own, for this long")
    add("--row-seconds", type=float, default=90.0, help="the most one row may take")
    add("--seconds", type=float, default=0.1, help="about how long one time is repeated")
    add("--no-graph", action="store_true", help="no times of CUDA graphs")
    add("--no-check", action="store_true", help="no errors against the reference")
    add("--first-call", action="store_true", help="seconds of first calls in fresh processes")
    add("--jobs", type=int, default=1, help="processes at once of --first-call")
    add("--first-call-of", help=argparse.SUPPRESS)
    return parser


def _facts(preset: str, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    packages = {}
    for name in ("torch", "triton", "lme-kernels", "liger-kernel", "flash-linear-attention"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    is_cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if is_cuda else platform.machine(),
        "preset": preset,
        "dtype": str(dtype).removeprefix("torch."),
        "python": platform.python_version(),
        "packages": packages,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _measure_all(
    options: argparse.Namespace,
    preset: str,
    cases: list[Case],
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    start = time.monotonic()
    watch = Stopwatch(device, options.seconds)
    facts = _facts(preset, device, dtype)
    print(" ".join(f"{key}={value}" for key, value in facts.items()))
    ceilings = measure_ceilings(watch, dtype)
    print(f"copy {ceilings.copy / 1e12:.3f} TB/s, matmul {ceilings.matmul / 1e12:.1f} TFLOP/s")
    print(HEAD, flush=True)
    rows: list[Row] = []
    left_out: list[str] = []

    def left() -> float | None:
        if options.budget_seconds is None:
            return None
        return options.budget_seconds - (time.monotonic() - start)

    for case in cases:
        wanted = [
            each
            for each in variants_of(case, device)
            if options.variants is None or each in options.variants
        ]
        if not wanted:
            continue
        expected, automatic = None, None
        for variant in wanted:
            remaining = left()
            if remaining is not None and remaining <= 0:
                left_out.append(f"{case.op} {case.name} {variant}")
                continue
            if variant == wanted[0]:
                expected, automatic = _prepare(case, lambda: Draw(device, dtype), options)
            row = measure(
                case,
                variant,
                lambda: Draw(device, dtype),
                watch,
                expected=expected,
                # The reference is there to be compared with.
                with_graph=not options.no_graph and variant != "torch",
                seconds=options.row_seconds
                if remaining is None
                else min(options.row_seconds, max(remaining, 5.0)),
            )
            row.is_automatic = variant == automatic
            rows.append(row)
            print(line(row, ceilings), flush=True)
            if options.json is not None:
                write_json(options.json, rows, ceilings, {**facts, "left_out": left_out})
        expected = None
    for each in left_out:
        print(f"left out, no time: {each}")
    if options.json is not None:
        write_json(options.json, rows, ceilings, {**facts, "left_out": left_out})
    print(f"* is what a call takes that names no backend; {time.monotonic() - start:.0f} s in all")


def _prepare(
    case: Case, draw: Callable[[], Draw], options: argparse.Namespace
) -> tuple[Results | None, str | None]:
    """Results of the reference and the automatic choice; what fails is left out and said."""
    expected, automatic = None, None
    try:
        with limit(options.row_seconds):
            automatic = automatic_choice(case, case.make(draw()))
            if not options.no_check and not case.op.startswith(OPTIMIZERS):
                run, leaves = build(case, case.make(draw()), "torch")
                outputs, grads = results_of(run, leaves)
                expected = [each.detach() for each in outputs], grads
    except (Exception, OutOfTimeError) as error:
        print(f"    {case.op} {case.name}: not compared: {type(error).__name__}: {error}"[:300])
    return expected, automatic


def _measure_apart(options: argparse.Namespace, preset: str, ops: list[str]) -> None:
    arguments = ["--preset", preset, "--device", options.device]
    arguments += ["--seconds", str(options.seconds), "--row-seconds", str(options.row_seconds)]
    if options.dtype:
        arguments += ["--dtype", options.dtype]
    if options.variants:
        arguments += ["--variants", *options.variants]
    arguments += ["--no-graph"] * options.no_graph + ["--no-check"] * options.no_check
    start = time.monotonic()

    def left() -> float | None:
        if options.budget_seconds is None:
            return None
        return options.budget_seconds - (time.monotonic() - start)

    lost = measure_families(
        list(dict.fromkeys(ops)),
        arguments,
        seconds=options.op_seconds,
        left=left,
        path=options.json,
    )
    for each in lost:
        print(each, flush=True)


def _first_calls(
    options: argparse.Namespace,
    preset: str,
    chosen: list[tuple[int, Case]],
    device: torch.device,
) -> None:
    seen: set[tuple[str, str]] = set()
    pairs = []
    for index, case in chosen:
        for variant in variants_of(case, device):
            # One size an op is enough; the reference and eager torch compile nothing.
            wanted = variant not in ("torch", "eager", "foreach", "fused")
            if options.variants is not None:
                wanted = variant in options.variants
            if wanted and (case.op, variant) not in seen:
                seen.add((case.op, variant))
                pairs.append((preset, index, case, variant))
    child = ["--device", options.device]
    if options.dtype:
        child += ["--dtype", options.dtype]
    print("| op | case | code | first call s | second call s |\n| --- | --- | --- | --: | --: |")
    start = time.monotonic()
    found = []
    for at in range(0, len(pairs), options.jobs):
        spent = time.monotonic() - start
        if options.budget_seconds is not None and spent > options.budget_seconds:
            names = [f"{each[2].op} {each[3]}" for each in pairs[at:]]
            print(f"left out, no time: {', '.join(names)}")
            break
        batch = pairs[at : at + options.jobs]
        for each in measure_in_processes(batch, child, options.jobs, options.row_seconds):
            found.append(each)
            times = (
                f"{each.seconds:.2f} | {each.again_seconds:.4f}"
                if each.seconds is not None and each.again_seconds is not None
                else f"failed: {each.fault} |"
            )
            print(f"| {each.op} | {each.case} | {each.variant} | {times} |", flush=True)
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps([asdict(each) for each in found], indent=1))
