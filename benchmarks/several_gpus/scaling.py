"""Part `scaling`: tokens per second of two GPUs over those of one, and why it is not two."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from several_gpus.bench import Bench
from several_gpus.trace import read_events, summarise

WANTED = 1.9
_LOG_INTERVAL = 10
_TRACED_STEPS = 12
# Name, layout, and how many times the case's sequences a step.
RUNS = {
    "one GPU": ("one", 1),
    "FSDP2, the same batch": ("fsdp2", 1),
    "FSDP2, the same work a GPU": ("fsdp2", 2),
    "DDP, the same work a GPU": ("ddp", 2),
}
TITLES = ("run", "tokens/s", "of one GPU", "ms a step", "MFU", "peak GiB a GPU")
SHARES = ("compute", "communication", "communication hidden", "communication alone", "idle")
TRACE_TITLES = ("traced step", "ms on the GPU", *SHARES)


def measure_scaling(bench: Bench, *, always_traces: bool) -> None:
    """Measure speed with few looks at the loss; trace where two GPUs fall short.

    Args:
        bench: What is run.
        always_traces: Even if they do not.
    """
    found = {name: bench.attempt("scaling", name, _measured(bench, name)) for name in RUNS}
    ratios = [_ratio(found, name) for name in RUNS if name.startswith("FSDP2")]
    if always_traces or any(each is not None and each < WANTED for each in ratios):
        for name in RUNS:
            bench.attempt("traces", name, _traced(bench, name))


def scaling_rows(results: dict[str, Any]) -> list[list[str]]:
    """Return the rows of a table of the part `scaling`."""
    rows = []
    for name, each in results.items():
        if "failed" in each:
            rows.append([name, f"failed: {each['failed'][:160]}"])
            continue
        ratio = _ratio(results, name)
        mfu = "" if each["mfu"] is None else f"{100 * each['mfu']:.1f} %"
        rows.append(
            [
                name,
                f"{each['tokens_per_second']:,.0f}",
                "" if ratio is None else f"{ratio:.3f}",
                f"{1e3 * each['step_seconds']:.1f}",
                mfu,
                f"{each['peak_memory_bytes'] / 2**30:.2f}",
            ]
        )
    return rows


def trace_rows(results: dict[str, Any]) -> list[list[str]]:
    """Return the rows of a table of traces."""
    rows = []
    for name, each in results.items():
        if "failed" in each:
            rows.append([name, f"failed: {each['failed'][:160]}"])
            continue
        shares = [f"{100 * each[share]:.1f} %" for share in SHARES]
        rows.append([name, f"{each['milliseconds']:.1f}", *shares])
    return rows


def _measured(bench: Bench, name: str) -> Callable[[], dict[str, Any]]:
    layout, times = RUNS[name]

    def make() -> dict[str, Any]:
        # Each look waits for the device.
        changes = {"logging_args.log_interval": min(_LOG_INTERVAL, max(1, bench.steps // 5))}
        rows = times * bench.case.rows
        run = bench.run(_folder(name), "scaling", layout=layout, rows=rows, changes=changes)
        shutil.rmtree(bench.folder / bench.case.name / "scaling" / _folder(name))
        return run.numbers(bench.warmup)

    return make


def _traced(bench: Bench, name: str) -> Callable[[], dict[str, Any]]:
    layout, times = RUNS[name]

    def make() -> dict[str, Any]:
        traces = bench.folder / bench.case.name / "traces" / _folder(name) / "trace"
        changes = {
            "logging_args.log_interval": _TRACED_STEPS,
            "logging_args.torch_profiler_trace_path": str(traces),
            "training_parameters.num_training_steps": _TRACED_STEPS,
        }
        rows = times * bench.case.rows
        bench.run(_folder(name), "traces", layout=layout, rows=rows, changes=changes)
        summary = summarise(read_events(traces))
        shutil.rmtree(traces.parent)
        return summary or {"failed": "nothing ran on a GPU"}

    return make


def _ratio(results: dict[str, Any], name: str) -> float | None:
    rates = [results.get(each, {}).get("tokens_per_second") for each in (name, "one GPU")]
    return None if None in rates else rates[0] / rates[1]


def _folder(name: str) -> str:
    return Path(name.replace(", ", "-").replace(" ", "-")).name


def kernel_tables(results: dict[str, Any]) -> list[str]:
    """Return for each trace what took longest on the device."""
    said = []
    for name, each in results.items():
        lines = [
            f"- {kernel['milliseconds']:.2f} ms: `{kernel['name']}`"
            for kernel in each.get("kernels", [])
        ]
        if lines:
            said.append(f"{name}, longest in all:\n\n" + "\n".join(lines) + "\n")
    return said
