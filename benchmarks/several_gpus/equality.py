"""Part `layouts`: every layout trains the same model on the same tokens as one GPU."""

from typing import Any

from several_gpus.bench import Bench
from several_gpus.comparing import ALLOWED, WRITTEN, compare, noise
from several_gpus.layouts import LAYOUTS, NOISE, ONE

TITLES = (
    "layout",
    "tokens/s",
    "range",
    "of one GPU",
    "MFU",
    "peak GiB a GPU",
    "loss, first",
    "loss, last",
    "apart, step 1",
    "apart, most",
    "at step",
    "equal",
)


def measure_layouts(bench: Bench, names: list[str]) -> None:
    """Train each layout; one GPU first, whatever is asked for."""
    for name in dict.fromkeys((ONE, *names)):
        bench.layout(name)


def bound(results: dict[str, Any]) -> float | None:
    """Return how far a layout's loss may be from that of one GPU; `None` if noise is not known.

    Args:
        results: Of the part `layouts`.
    """
    if "losses" not in results.get(ONE, {}):
        return None
    known = [results[name]["losses"] for name in NOISE if "losses" in results.get(name, {})]
    found = noise(known, results[ONE]["losses"])
    return None if found is None else ALLOWED * max(found, WRITTEN)


def layout_rows(results: dict[str, Any]) -> list[list[str]]:
    """Return the rows of a table.

    Args:
        results: Of the part `layouts`.
    """
    rows, limit = [], bound(results)
    reference = results.get(ONE, {})
    for name, layout in LAYOUTS.items():
        each, title = results.get(name), layout.title
        if each is None:
            continue
        if "failed" in each:
            rows.append([title, f"failed: {each['failed'][:160]}"])
            continue
        numbers, losses = speed(each, reference), list(each["losses"].values())
        row = [title, *numbers, f"{losses[0]:.4f}", f"{losses[-1]:.4f}"]
        apart = compare(each["losses"], reference.get("losses", {}))
        if name != ONE and apart is not None:
            row += [f"{apart.first:.1e}", f"{apart.largest:.1e}", str(apart.step)]
            if name not in NOISE and limit is not None:
                row.append("yes" if apart.largest <= limit else "NO")
        rows.append(row)
    return rows


def speed(each: dict[str, Any], reference: dict[str, Any]) -> list[str]:
    """Return the columns of speed and memory."""
    rate = each["tokens_per_second"]
    spread = f"{each['slowest']:,.0f} to {each['fastest']:,.0f}"
    base = reference.get("tokens_per_second")
    times = "" if base is None else f"{rate / base:.2f}"
    mfu = "" if each["mfu"] is None else f"{100 * each['mfu']:.1f} %"
    return [f"{rate:,.0f}", spread, times, mfu, f"{each['peak_memory_bytes'] / 2**30:.2f}"]


def bound_text(results: dict[str, Any]) -> str:
    """Say what `equal` means, and where the number comes from."""
    limit = bound(results)
    if limit is None:
        return "Noise is not known: none of the runs that measure it was made.\n"
    reference = results[ONE]["losses"]
    parts = []
    for name in NOISE:
        apart = compare(results.get(name, {}).get("losses", {}), reference)
        if apart is not None:
            parts.append(f"{apart.largest:.1e} ({LAYOUTS[name].title})")
    return (
        f"Losses are equal if they are within {limit:.1e} of one GPU's at every step: {ALLOWED:g}"
        " times the most by which runs on one GPU are apart that compute the same and round"
        f" differently, which is {' and '.join(parts)}.\n"
    )
