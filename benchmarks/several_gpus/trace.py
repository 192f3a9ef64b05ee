"""What a step's time goes to, from a trace that `logging_args.torch_profiler_trace_path` left."""

import gzip
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_ON_DEVICE = frozenset({"kernel", "gpu_memcpy", "gpu_memset"})

Span = tuple[float, float]


def read_events(folder: Path) -> list[dict[str, Any]]:
    """Read the one trace in a folder."""
    (file,) = [each for each in folder.iterdir() if ".pt.trace.json" in each.name]
    content = file.read_bytes()
    return json.loads(gzip.decompress(content) if file.suffix == ".gz" else content)["traceEvents"]


def summarise(events: Iterable[dict[str, Any]], most: int = 12) -> dict[str, Any] | None:
    """Say how long the device computed, communicated, did both, and did nothing.

    Args:
        events: Of a trace of some steps, as Chrome reads them; times are microseconds.
        most: How many kernels are listed.

    Returns:
        Milliseconds from the first to the last thing on the device, and shares of them; `None`
        if nothing ran on a device.
    """
    found = [each for each in events if each.get("cat") in _ON_DEVICE and "dur" in each]
    if not found:
        return None
    talk = [each for each in found if "nccl" in each["name"].lower()]
    work = [each for each in found if "nccl" not in each["name"].lower()]
    talking, working = _union(map(_span, talk)), _union(map(_span, work))
    either = _union([*talking, *working])
    whole = either[-1][1] - either[0][0]
    both = _length(talking) + _length(working) - _length(either)
    times: Counter[str] = Counter()
    for each in found:
        times[each["name"]] += each["dur"]
    return {
        "milliseconds": whole / 1e3,
        "compute": _length(working) / whole,
        "communication": _length(talking) / whole,
        "communication hidden": both / whole,
        "communication alone": (_length(talking) - both) / whole,
        "idle": 1 - _length(either) / whole,
        "kernels": [
            {"name": name[:100], "milliseconds": took / 1e3}
            for name, took in times.most_common(most)
        ],
    }


def _span(event: dict[str, Any]) -> Span:
    start = float(event["ts"])
    return start, start + float(event["dur"])


def _union(spans: Iterable[Span]) -> list[Span]:
    """Join what overlaps, in order."""
    joined: list[Span] = []
    for start, end in sorted(spans):
        if joined and start <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(end, joined[-1][1])
        else:
            joined.append((start, end))
    return joined


def _length(spans: Iterable[Span]) -> float:
    return sum(end - start for start, end in spans)
