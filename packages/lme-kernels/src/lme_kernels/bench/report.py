"""Rows as Markdown and as JSON."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lme_kernels.bench.ceilings import Ceilings
from lme_kernels.bench.measure import Row

HEAD = (
    "| op | case | code | fwd µs | bwd µs | fwd+bwd µs | graph fwd | graph fwd+bwd "
    "| fwd % copy | fwd+bwd % copy | fwd % matmul | fwd+bwd % matmul | extra MiB | error |\n"
    "| --- | --- | --- | --: | --: | --: | --: | --: | --: | --: | --: | --: | --: | --: |"
)


def line(row: Row, ceilings: Ceilings) -> str:
    """Write a row of the table.

    Shares of the rates are those of the CUDA graph's time if there is one, else of the eager time:
    the least bytes or operations of the call, over that time, over the measured rate.

    Args:
        row: What was measured.
        ceilings: Rates of the device.

    Returns:
        One line; texts of failures follow in further lines.
    """
    copied = shares(row, ceilings, of="bytes")
    computed = shares(row, ceilings, of="flops")
    cells = [
        row.op,
        row.case,
        row.variant + (" *" if row.is_automatic else ""),
        *(_microseconds(row, name) for name in ("forward", "backward", "both")),
        *(_microseconds(row, name) for name in ("graph forward", "graph both")),
        *(_percent(copied.get(name)) for name in ("forward", "both")),
        *(_percent(computed.get(name)) for name in ("forward", "both")),
        "" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.0f}",
        "" if row.error is None else f"{row.error:.1e}",
    ]
    text = "| " + " | ".join(cells) + " |"
    for name, fault in row.faults.items():
        text += f"\n    {row.op} {row.case} {row.variant}: {name} failed: {fault}"
    return text


def shares(row: Row, ceilings: Ceilings, *, of: str) -> dict[str, float]:
    """Fractions of a rate that "forward" and "both" reach.

    Args:
        row: What was measured.
        ceilings: Rates of the device.
        of: "bytes" or "flops".

    Returns:
        By "forward" and "both"; what was not measured, or costs nothing, is left out.
    """
    if row.cost is None:
        return {}
    if of == "bytes":
        rate, forward = ceilings.copy, row.cost.forward_bytes
        both = forward + row.cost.backward_bytes
    else:
        rate, forward = ceilings.matmul, row.cost.forward_flops
        both = forward + row.cost.backward_flops
    found = {}
    for name, work in (("forward", forward), ("both", both)):
        times = row.times.get(f"graph {name}", row.times.get(name))
        if times is not None and work > 0:
            found[name] = work / times.median / rate
    return found


def write_json(
    path: Path, rows: Sequence[Row], ceilings: Ceilings, facts: Mapping[str, Any]
) -> None:
    """Write all rows so far, so that a run that is cut short keeps them.

    Args:
        path: The file.
        rows: What was measured.
        ceilings: Rates of the device.
        facts: What else to say: device, versions, options.
    """
    content = {
        "facts": dict(facts),
        "ceilings": asdict(ceilings),
        "rows": [
            {
                **asdict(row),
                "share_of_copy": shares(row, ceilings, of="bytes"),
                "share_of_matmul": shares(row, ceilings, of="flops"),
            }
            for row in rows
        ],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1))


def _microseconds(row: Row, name: str) -> str:
    if name not in row.times:
        return "failed" if name in row.faults else ""
    median = row.times[name].median * 1e6
    return f"{median:.1f}" if median < 1000 else f"{median:.0f}"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.0f}"
