"""Keep the table of kernels in the README of lme-kernels, and what it says was run on a device.

`python tools/kernel_matrix.py` rewrites the table from the registry and the recorded proofs;
`--check` only says whether it is up to date. `--record junit.xml --machine "NVIDIA H100"` takes the
results of `pytest -m gpu --junitxml junit.xml`, run on that machine, into `proofs.json` first. Most
of such a test is compilation on the host: `-n 12` (pytest-xdist) shares a GPU among processes, with
`-k "not two_to"`, and `-k two_to` alone for those that fill its memory.
"""

import argparse
import datetime
import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Mapping
from pathlib import Path

from lme_kernels.functional import ALL_OPS
from lme_kernels.op import Backend, Op
from lme_kernels.optim.adamw import ADAMW
from lme_kernels.optim.gradients import GRAD_NORM
from lme_kernels.proofs import Proof, parse_proofs

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "packages" / "lme-kernels"
README = PACKAGE / "README.md"
PROOFS = PACKAGE / "src" / "lme_kernels" / "proofs.json"
BEGIN = "<!-- kernel matrix: written by tools/kernel_matrix.py -->"
END = "<!-- end of kernel matrix -->"

# Tests of these files name a backend and no op.
FILES = {
    "test_adamw": ADAMW.name,
    "test_stochastic_rounding": ADAMW.name,
    "test_gradients": GRAD_NORM.name,
}
OPS: Mapping[str, Op] = {**ALL_OPS, ADAMW.name: ADAMW, GRAD_NORM.name: GRAD_NORM}
NAMED = re.compile(r"\b([a-z0-9_]+)@([a-z0-9_]+)")


def implementation_of(module: str, test: str) -> str | None:
    """Say which implementation a test is of.

    Args:
        module: Dotted name of its file, as junit gives it.
        test: Its name with its parameters.

    Returns:
        "op@backend", or `None` for a test of something else.
    """
    for op, backend in NAMED.findall(test):
        if op in OPS and (backend == Backend.TORCH or backend in OPS[op].implementations):
            return f"{op}@{backend}"
    op = FILES.get(module.rpartition(".")[2])
    parameters = test.partition("[")[2].rstrip("]").split("-")
    # Such a test runs its kernels where the parameter says.
    found = [each for each in parameters if op and each in OPS[op].implementations]
    return f"{op}@{found[0]}" if found and "cpu" not in parameters else None


def count_results(junit: str) -> dict[str, tuple[int, int]]:
    """Count what passed and failed; skipped tests prove nothing.

    Args:
        junit: Contents of a file that `pytest --junitxml` wrote.

    Returns:
        Passed and failed tests by "op@backend".
    """
    counts: dict[str, tuple[int, int]] = {}
    for case in ET.fromstring(junit).iter("testcase"):
        name = implementation_of(case.get("classname", ""), case.get("name", ""))
        if name is None or case.find("skipped") is not None:
            continue
        failed = case.find("failure") is not None or case.find("error") is not None
        passed, wrong = counts.get(name, (0, 0))
        counts[name] = (passed + (not failed), wrong + failed)
    return counts


def record(junit: str, proofs: str, *, machine: str, date: str, commit: str) -> str:
    """Replace what is known of one machine by newer results.

    Args:
        junit: Contents of the results.
        proofs: Contents of `proofs.json`.
        machine: Name of the device.
        date: Day of the run.
        commit: What was tested.

    Returns:
        New contents; implementations that the results do not name keep their entries.
    """
    content = json.loads(proofs)
    for name, (passed, failed) in count_results(junit).items():
        content.setdefault(name, {})[machine] = {
            "date": date,
            "commit": commit,
            "passed": passed,
            "failed": failed,
        }
    return json.dumps(content, indent=1, sort_keys=True) + "\n"


def cell(op: Op, backend: str, proofs: Iterable[Proof]) -> str:
    """Say in a few words what one implementation is.

    Args:
        op: The op.
        backend: One of its implementations, or a backend it has not.
        proofs: What is recorded of it.

    Returns:
        Where it is proven, or that it is not; "by name" if it never runs unasked.
    """
    if backend not in op.implementations:
        return ""
    listed = list(proofs)
    proven = [each.machine for each in listed if each.holds]
    failed = [each.machine for each in listed if not each.holds]
    if failed:
        text = f"fails on {', '.join(failed)}"
    elif proven:
        text = ", ".join(proven)
    elif backend == Backend.NKI:
        text = "not run on hardware"
    else:
        text = "not recorded"
    return f"{text}; by name" if backend in op.manual else text


def matrix(proofs: Mapping[str, Iterable[Proof]]) -> str:
    """Write the table as Markdown.

    Args:
        proofs: By "op@backend", what is recorded.

    Returns:
        The table, what its words mean, and the runs behind it.
    """
    columns = [each for each in Backend if each is not Backend.TORCH]
    rows = [
        "| op | " + " | ".join(columns) + " | others |",
        "| --- " * (len(columns) + 2) + "|",
    ]
    for name, op in sorted(OPS.items()):
        cells = [cell(op, each, proofs.get(f"{name}@{each}", ())) for each in columns]
        others = [
            f"`{each}`: {cell(op, each, proofs.get(f'{name}@{each}', ()))}"
            for each in op.implementations
            if each not in set(Backend)
        ]
        rows.append(f"| `{name}` | {' | '.join(cells)} | {', '.join(others)} |")
    runs: dict[tuple[str, str, str], tuple[int, int]] = {}
    for entries in proofs.values():
        for each in entries:
            passed, failed = runs.get((each.machine, each.date, each.commit), (0, 0))
            runs[each.machine, each.date, each.commit] = passed + each.passed, failed + each.failed
    notes = [
        f"- {machine}: {passed} tests passed and {failed} failed on {date} at `{commit}`."
        for (machine, date, commit), (passed, failed) in sorted(runs.items())
    ]
    return "\n".join(
        [
            *rows,
            "",
            "Every op has a torch reference, which serves every device. A cell names the machines on",
            "which all tests of an implementation passed; *not recorded*: only under Triton's or",
            "Pallas' interpreter, an emulator or a compiler so far; *by name*: never chosen unless",
            "`backend=` or `kernel_args` names it.",
            *(["", *notes] if notes else []),
        ]
    )


def updated(readme: str, table: str) -> str:
    """Put the table between its marks.

    Args:
        readme: The page.
        table: The table.

    Returns:
        The page with it.
    """
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        sys.exit(f"{README} lacks the lines `{BEGIN}` and `{END}`")
    return f"{before}{BEGIN}\n\n{table}\n\n{END}{after}"


def main() -> None:
    """Record if asked to, then write the table or check it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; fail if it is stale")
    parser.add_argument("--record", type=Path, help="results of a run, as pytest's --junitxml")
    parser.add_argument("--machine", help="device of these results")
    parser.add_argument("--date", default=datetime.date.today().isoformat())
    parser.add_argument("--commit", help="what was tested; default: this one")
    options = parser.parse_args()
    if options.record is not None:
        if not options.machine:
            sys.exit("`--record` needs `--machine`: the device that ran the tests")
        commit = options.commit or _head()
        text = record(
            options.record.read_text(),
            PROOFS.read_text(),
            machine=options.machine,
            date=options.date,
            commit=commit,
        )
        PROOFS.write_text(text)
    page = README.read_text()
    wanted = updated(page, matrix(parse_proofs(PROOFS.read_text())))
    if options.check and wanted != page:
        sys.exit(f"{README} is out of date; run `python tools/kernel_matrix.py`")
    if not options.check:
        README.write_text(wanted)


def _head() -> str:
    command = ["git", "rev-parse", "--short=7", "HEAD"]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()


if __name__ == "__main__":
    main()
