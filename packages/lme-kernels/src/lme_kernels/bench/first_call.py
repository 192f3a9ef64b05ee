"""Seconds of the first call in a fresh process whose caches are empty: compiling, and tuning if any."""

import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from lme_kernels.bench.calls import Case, Draw
from lme_kernels.bench.measure import results_of
from lme_kernels.bench.variants import build

# Variables that say where compiled code is kept.
CACHES = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "XDG_CACHE_HOME", "CUDA_CACHE_PATH")


@dataclass(frozen=True, slots=True)
class FirstCall:
    """What one process measured."""

    op: str
    case: str
    variant: str
    seconds: float | None
    """Imports of kernels, forward and backward, the device waited for; torch's import left out."""
    again_seconds: float | None
    """The second call."""
    fault: str | None


def measure_in_processes(
    pairs: list[tuple[str, int, Case, str]], arguments: list[str], jobs: int, seconds: float
) -> list[FirstCall]:
    """Measure first calls, each in a process of its own.

    Args:
        pairs: Preset, index in it, case and variant.
        arguments: Options of this program that every process gets.
        jobs: Processes at once; more than one makes each a little slower.
        seconds: The most that one process may take.

    Returns:
        One entry a pair, in order.
    """

    def run(pair: tuple[str, int, Case, str]) -> FirstCall:
        preset, index, case, variant = pair
        child = ["--first-call-of", f"{preset}:{index}:{variant}", *arguments]
        with tempfile.TemporaryDirectory() as folder:
            environment = dict(os.environ)
            for name in CACHES:
                environment[name] = os.path.join(folder, name.lower())  # noqa: PTH118
            try:
                result = subprocess.run(
                    [sys.executable, "-m", "lme_kernels.bench", *child],
                    env=environment,
                    capture_output=True,
                    text=True,
                    check=False,
                    timeout=seconds,
                )
            except subprocess.TimeoutExpired:
                return FirstCall(case.op, case.name, variant, None, None, f"over {seconds:.0f} s")
        if result.returncode != 0:
            lines = result.stderr.strip().splitlines() or ["no output"]
            return FirstCall(case.op, case.name, variant, None, None, lines[-1][:300])
        first, again = json.loads(result.stdout.splitlines()[-1])
        return FirstCall(case.op, case.name, variant, first, again, None)

    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(run, pairs))


def measure_here(
    case: Case, variant: str, device: torch.device, dtype: torch.dtype
) -> tuple[float, float]:
    """Measure the first call and the second in this process.

    Args:
        case: The case.
        variant: Which code.
        device: Where it runs.
        dtype: Dtype of the tensors.

    Returns:
        Seconds of both.
    """
    call = case.make(Draw(device, dtype))
    # What torch itself loads at its first backward is none of the kernel's.
    leaf = torch.ones((), device=device, requires_grad=True)
    torch.autograd.grad(leaf * 2, leaf, torch.ones_like(leaf))
    wait = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    wait()
    start = time.perf_counter()
    run, leaves = build(case, call, variant)
    results_of(run, leaves)
    wait()
    first = time.perf_counter() - start
    start = time.perf_counter()
    results_of(run, leaves)
    wait()
    return first, time.perf_counter() - start
