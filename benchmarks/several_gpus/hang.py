"""Part `hang`: the faults of the watchdog's tests in two processes, over NCCL and over gloo."""

import re
import tempfile
import time
from datetime import timedelta
from itertools import product
from pathlib import Path
from typing import Any

import torch
from several_gpus.bench import read_results, write_results
from several_gpus.runs import Budget, OutOfTimeError, free_port, nothing
from torch import distributed

from lme_parallel.testing import load_source, run_until_ended

SCRIPTS = (
    Path(__file__).resolve().parents[2] / "packages/lme-parallel/tests/watchdog/test_faults.py"
)
DEFAULT = ["skipped collective", "sleeping forward", "killed"]
TITLES = ("fault", "rank", "over", "named", "right", "as on CPU", "s", "what the watchdog said")
_PROCESSES = 2
# Of two that disagree nobody can say who is wrong: both are named, unless one crashes over it.
_MUTUAL = frozenset({"skipped collective", "wrong shape", "rank-only call"})


def measure_hangs(file: Path, budget: Budget, faults: list[str], devices: list[str]) -> list[str]:
    """Let each rank commit each fault, and keep what was said.

    Args:
        file: Of results.
        budget: Of this script.
        faults: Names in the tests of the watchdog.
        devices: `cpu` before `cuda`, which is compared with it.

    Returns:
        What time did not allow.
    """
    skipped = []
    # So that the first does not wait for the server of processes.
    run_until_ended(nothing, 1)
    for fault, guilty, device in product(faults, range(_PROCESSES), devices):
        name = f"{fault}, rank {guilty}, {device}"
        try:
            limit = budget.left()
        except OutOfTimeError as error:
            skipped.append(f"hang, {name}: {error}")
            continue
        print(f"hang: {name} ...", flush=True)
        _keep(file, name, _commit(fault, guilty, device, limit))
    return skipped


def _commit(fault: str, guilty: int, device: str, limit: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        started = time.monotonic()
        codes = run_until_ended(
            strike,
            _PROCESSES,
            fault,
            guilty,
            folder,
            free_port(),
            device,
            timeout_seconds=min(limit, 60.0),
        )
        seconds = time.monotonic() - started
        said = [each.read_text() for each in sorted(Path(folder).glob("said-*"))]
    result = {"fault": fault, "guilty": guilty, "device": device, "codes": codes}
    if len(said) != 1:
        return {**result, "failed": f"{len(said)} sentences, exit codes {codes}"}
    sentence = re.sub(r" \(stacks of all threads: .*\)$", "", said[0])
    named = culprits(sentence)
    is_right = named == [guilty] or (fault in _MUTUAL and named == list(range(_PROCESSES)))
    return {
        **result,
        "sentence": sentence,
        "named": named,
        "right": is_right and None not in codes,
        "seconds": seconds,
    }


def strike(fault: str, guilty: int, folder: str, port: int, device: str) -> None:
    """Run the tests' script in one of the processes."""
    scripts = load_source(str(SCRIPTS))
    if device == "cuda":
        # What a first call of anything takes.
        scripts.SECONDS = 3.0
        rank, size = distributed.get_rank(), distributed.get_world_size()
        distributed.destroy_process_group()
        torch.cuda.set_device(rank)
        distributed.init_process_group(
            "cpu:gloo,cuda:nccl",
            init_method=f"file://{folder}/rendezvous",
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=60),
            device_id=torch.device("cuda", rank),
        )
        # Connections take longer to make than the script's watchdog waits.
        for shape in (8, 1):
            distributed.all_reduce(torch.ones(shape, device="cuda"))
        torch.cuda.synchronize()
    # One that starts late is none that hangs.
    distributed.barrier()
    scripts.train(fault, guilty, folder, str(port), device)


def culprits(sentence: str) -> list[int]:
    """Return the ranks that a sentence of the watchdog blames, not those that only wait."""
    found = []
    for clause in sentence.split("; "):
        blamed = re.match(r"rank (\d+)(?! waits| is in| lost)", clause)
        if blamed:
            found.append(int(blamed[1]))
    return sorted(found)


def _keep(file: Path, name: str, found: dict[str, Any]) -> None:
    results = read_results(file)
    results.setdefault("hang", {})[name] = found
    write_results(file, results)


def hang_rows(results: dict[str, Any]) -> list[list[str]]:
    """Return the rows of a table of the part `hang`."""
    rows = []
    for name, each in results.items():
        if "failed" in each:
            rows.append([name, "", "", "", "NO", "", "", f"failed: {each['failed']}"])
            continue
        over = {"cuda": "NCCL", "cpu": "gloo"}[each["device"]]
        reference = results.get(f"{each['fault']}, rank {each['guilty']}, cpu", {})
        is_same = general(reference.get("sentence", "")) == general(each["sentence"])
        rows.append(
            [
                each["fault"],
                str(each["guilty"]),
                over,
                ", ".join(map(str, each["named"])) or "nobody",
                "yes" if each["right"] else "NO",
                "" if each["device"] == "cpu" else "yes" if is_same else "other words",
                f"{each['seconds']:.1f}",
                each["sentence"].replace(str(SCRIPTS.parent) + "/", ""),
            ]
        )
    return rows


def general(sentence: str) -> str:
    """Leave out what differs from run to run: places, processes, phases and who waits in what."""
    blamed = [each for each in sentence.split("; ") if culprits(each)]
    text = re.sub(r"\(process \d+ on \S+\)", "", " and ".join(blamed))
    text = re.sub(r", last seen in \w+ at.*|\bgloo:|\bnccl:", "", text)
    return re.sub(r"\S+\.py:\d+( for \d+ s)?", "a line", text)
