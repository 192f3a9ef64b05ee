"""Run the tests marked `gpu` in several processes on one GPU, and print what failed.

Most of such a test is compilation on the host, so that one process leaves the GPU idle:
`python tools/gpu_tests.py --processes 12 packages/lme-kernels/tests packages/lme-core/tests`. Tests
that fill the memory of a GPU by themselves (`--alone`, part of a name) run after the others, one by
one. `--junit` collects all results in one file, which `tools/kernel_matrix.py --record` reads.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def collect(paths: Sequence[str], marker: str) -> list[str]:
    """Names of the tests with a marker, in the order of their files."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", marker, *paths]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    names = [line for line in found.stdout.splitlines() if "::" in line]
    if not names or found.returncode != 0:
        raise SystemExit(
            f"no tests marked `{marker}` in {' '.join(paths)}:\n{found.stdout[-2000:]}"
        )
    return names


def run(groups: Sequence[Sequence[str]], marker: str, folder: Path, seconds: float) -> int:
    """Run each group in a process of its own, all at once; stop what runs longer than `seconds`.

    Returns:
        Processes that did not end by themselves, all of whose results may be missing.
    """
    threads = str(max(1, (os.cpu_count() or 1) // max(1, len(groups))))
    processes = []
    for group in groups:
        name = f"{time.monotonic_ns()}"
        (folder / name).write_text("\n".join(group))
        command = [sys.executable, "-m", "pytest", "-q", "-m", marker, "--tb=short"]
        command += ["-p", "no:cacheprovider", f"--junitxml={folder / name}.xml"]
        command += [f"@{folder / name}"]
        with (folder / f"{name}.log").open("w") as log:
            processes.append(
                subprocess.Popen(
                    command,
                    cwd=ROOT,
                    env={**os.environ, "OMP_NUM_THREADS": threads},
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            )
    end, stopped = time.monotonic() + seconds, 0
    for process in processes:
        try:
            process.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            # As Ctrl-C: pytest writes what it has.
            process.send_signal(2)
            process.wait(30)
            stopped += 1
    return stopped


def merge(folder: Path) -> ET.Element:
    """One junit document of all that processes wrote."""
    suites = ET.Element("testsuites")
    for each in sorted(folder.glob("*.xml")):
        suites.extend(ET.parse(each).getroot())
    return suites


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("paths", nargs="+", help="files or folders of tests")
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--marker", default="gpu")
    parser.add_argument("--alone", nargs="*", default=["two_to"], help="parts of names")
    parser.add_argument("--seconds", type=float, default=360.0, help="for all of them")
    parser.add_argument("--junit", type=Path, help="where to write the results")
    parser.add_argument("--logs", type=Path, help="where to keep what the processes said")
    options = parser.parse_args()
    begin = time.monotonic()
    names = collect(options.paths, options.marker)
    alone = [name for name in names if any(part in name for part in options.alone)]
    rest = [name for name in names if name not in set(alone)]
    print(f"{len(names)} tests, {len(alone)} of them one by one", flush=True)
    folder = options.logs or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    count = max(1, min(options.processes, len(rest)))
    stopped = run([rest[k::count] for k in range(count)], options.marker, folder, options.seconds)
    if alone:
        left = options.seconds - (time.monotonic() - begin)
        stopped += run([alone], options.marker, folder, left)
    suites = merge(folder)
    if options.junit:
        ET.ElementTree(suites).write(options.junit)
    cases = list(suites.iter("testcase"))
    bad = [c for c in cases if c.find("failure") is not None or c.find("error") is not None]
    skipped = sum(case.find("skipped") is not None for case in cases)
    for case in bad:
        problem = case.find("failure") if case.find("failure") is not None else case.find("error")
        message = (problem.get("message") or "") if problem is not None else ""
        print(f"FAILED {case.get('classname')}::{case.get('name')}: {message[:300]}")
    passed = len(cases) - len(bad) - skipped
    print(
        f"{passed} passed, {len(bad)} failed, {skipped} skipped, {len(names) - len(cases)} not run, "
        f"in {time.monotonic() - begin:.0f} s by {count} processes; logs in {folder}"
    )
    return 1 if bad or stopped or len(cases) < len(names) else 0


if __name__ == "__main__":
    raise SystemExit(main())
