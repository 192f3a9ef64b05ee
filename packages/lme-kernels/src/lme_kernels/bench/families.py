"""Measure each op in a process of its own, so that a crash or a hang loses no other."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# What a process may take beyond what it was told to, in seconds: it is killed then.
GRACE = 30.0


def measure_families(
    ops: Sequence[str],
    arguments: Sequence[str],
    *,
    seconds: float,
    left: Callable[[], float | None],
    path: Path | None,
) -> list[str]:
    """Run this program once an op, and gather what the runs write.

    Args:
        ops: Names of ops.
        arguments: Options that every process gets.
        seconds: After this long a process starts no further row; it is killed some time later.
        left: Seconds that all may still take; `None` for any.
        path: File to write all numbers to after each op; `None` for none.

    Returns:
        What failed and what was left out, in words.
    """
    gathered: dict[str, Any] = {"rows": []}
    lost: list[str] = []
    for op in ops:
        remaining = left()
        if remaining is not None and remaining <= 0:
            lost.append(f"left out, no time: {op}")
            continue
        budget = seconds if remaining is None else min(seconds, remaining)
        with tempfile.TemporaryDirectory() as folder:
            rows = Path(folder) / "rows.json"
            fault = _run(op, [*arguments, "--json", str(rows)], budget)
            if fault is not None:
                lost.append(f"{op}: {fault}")
            if rows.exists():
                content = json.loads(rows.read_text())
                gathered = {**content, "rows": [*gathered["rows"], *content["rows"]]}
        gathered["lost"] = list(lost)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(gathered, indent=1))
    return lost


def _run(op: str, arguments: Sequence[str], budget: float) -> str | None:
    command = [sys.executable, "-m", "lme_kernels.bench", "--ops", op, *arguments]
    try:
        result = subprocess.run(
            [*command, "--budget-seconds", str(budget)], check=False, timeout=budget + GRACE
        )
    except subprocess.TimeoutExpired:
        return f"killed after {budget + GRACE:.0f} s"
    return None if result.returncode == 0 else f"ended with code {result.returncode}"
