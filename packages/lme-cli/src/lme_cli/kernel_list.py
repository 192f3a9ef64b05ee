"""What `lme kernels list` prints: each implementation, whether it runs here, and where it is proven."""

from lme_kernels import device
from lme_kernels.functional import ALL_OPS
from lme_kernels.op import Op
from lme_kernels.proofs import load_proofs


def kernel_table() -> str:
    """Write one row an implementation, and below why some cannot run on this machine.

    Returns:
        Markdown. "here" is the type of the devices that it runs on, or the number of a reason;
        "unasked" says whether a run takes it without naming it.
    """
    proofs = load_proofs()
    reasons: list[str] = []
    rows = [("op", "backend", "here", "unasked", "proven on")]
    for name, op in ALL_OPS.items():
        for backend in (*op.implementations, "torch"):
            proven = [
                f"{each.machine}, {each.date}" if each.holds else f"fails on {each.machine}"
                for each in proofs.get(f"{name}@{backend}", ())
            ]
            unasked = "no" if backend in op.manual else "yes"
            here = _here(op, backend, reasons)
            where = "every device" if backend == "torch" else "; ".join(proven) or "no device"
            rows.append((name, str(backend), here, unasked, where))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [_line(row, widths) for row in rows]
    lines.insert(1, _line(tuple("-" * width for width in widths), widths))
    lines.append("")
    lines += [f"({number}) {reason}" for number, reason in enumerate(reasons, start=1)]
    return "\n".join(lines)


def _here(op: Op, backend: str, reasons: list[str]) -> str:
    if backend == "torch":
        return ", ".join(device.types_here())
    found = {kind: device.why_unavailable(backend, kind) for kind in device.types_here()}
    usable = [kind for kind, reason in found.items() if reason is None]
    if usable:
        return ", ".join(usable)
    # The accelerator's reason, where there is one: it says more than the CPU's.
    reason = f"{backend}: {list(found.values())[-1]}"
    if reason not in reasons:
        reasons.append(reason)
    return f"no ({reasons.index(reason) + 1})"


def _line(cells: tuple[str, ...], widths: list[int]) -> str:
    padded = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
    return f"| {' | '.join(padded)} |"
