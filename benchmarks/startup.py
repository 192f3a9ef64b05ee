"""Seconds from the start of the process to the first step of a tiny run, median of several.

    python benchmarks/startup.py [--repeats 5]

The step counts as done when its line of metrics has been shown.
"""

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RUN_FILE = Path(__file__).resolve().parents[1] / "configs" / "pretrain" / "tiny-cpu.yml"


def seconds_to_first_step(folder: str) -> float:
    started = time.monotonic()
    process = subprocess.Popen(
        [
            sys.executable, "-m", "lme_cli", "train", str(RUN_FILE),
            "--set", f"save_args.save_path={folder}",
            "--set", "logging_args.log_interval=1",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )  # fmt: skip
    assert process.stdout is not None
    seconds = None
    for line in process.stdout:
        if line.startswith("step 1/"):
            seconds = time.monotonic() - started
            break
    process.kill()
    process.wait()
    if seconds is None:
        raise RuntimeError("the run ended before its first step; start it by hand to see why")
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    measured = []
    for number in range(repeats + 1):
        with tempfile.TemporaryDirectory() as folder:
            seconds = seconds_to_first_step(folder)
        # The first one fills the file cache.
        if number:
            measured.append(seconds)
            print(f"{seconds:.2f} s", flush=True)
    load = os.getloadavg()[0]
    print(
        f"median {statistics.median(measured):.2f} s of {repeats} "
        f"({os.cpu_count()} cores, load {load:.1f}, {platform.python_version()})"
    )


if __name__ == "__main__":
    main()
