"""Saving and loading 1 GiB of fp32: lme-parallel beside torch.distributed.checkpoint.

    python benchmarks/checkpoint.py [--folder DIR] [--repeats 5] [--mebibytes 1024]

Same process, same disk, alternating. Both write until the data is on disk: DCP syncs its data
file and its metadata file, and no directory; lme-parallel syncs every file and every directory,
writes checksums and commits. Loading goes into the tensors that are there. `warm` reads what the
page cache holds after writing, `cold` after the files were evicted from it.
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp

from lme_parallel.checkpoint.reader import Checkpoint
from lme_parallel.checkpoint.snapshot import Snapshot, collect_tensors
from lme_parallel.checkpoint.writer import write_checkpoint


def make_parameters(mebibytes: int) -> dict[str, torch.nn.Parameter]:
    """An embedding of an eighth, then matrices of 16 MiB, each with a small vector."""
    shapes = {"embedding.weight": (mebibytes // 8 * 256, 1024)}
    for layer in range((mebibytes - mebibytes // 8) // 16):
        shapes[f"blocks.{layer}.weight"] = (4096, 1024)
        shapes[f"blocks.{layer}.norm"] = (1024,)
    return {name: torch.nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()}


class Ours:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, parameters: dict[str, torch.nn.Parameter]) -> None:
        snapshot = Snapshot(1, collect_tensors(parameters, {}, None), {"state.json": b"{}"})
        write_checkpoint(self.folder, snapshot, lambda name: None)

    def load(self, parameters: dict[str, torch.nn.Parameter]) -> None:
        checkpoint = Checkpoint(self.folder / "global_step1")
        checkpoint.read([(f"model/{name}", None, each) for name, each in parameters.items()])


class Theirs:
    def __init__(self, folder: Path, threads: int) -> None:
        self.folder, self.threads = folder, threads

    def save(self, parameters: dict[str, torch.nn.Parameter]) -> None:
        writer = dcp.FileSystemWriter(self.folder, thread_count=self.threads, sync_files=True)
        dcp.save(
            {n: p.detach() for n, p in parameters.items()}, storage_writer=writer, no_dist=True
        )

    def load(self, parameters: dict[str, torch.nn.Parameter]) -> None:
        state = {name: each.detach() for name, each in parameters.items()}
        dcp.load(state, storage_reader=dcp.FileSystemReader(self.folder), no_dist=True)


class Timer:
    """Seconds on the clock, and of all threads' work (`CPU`), which a busy machine stretches less."""

    def __init__(self, results: dict[str, list[float]], kind: str) -> None:
        self.results, self.kind = results, kind

    def __enter__(self) -> None:
        self.clock, self.work = time.perf_counter(), time.process_time()

    def __exit__(self, *_: object) -> None:
        clock, work = time.perf_counter() - self.clock, time.process_time() - self.work
        self.results.setdefault(self.kind, []).append(clock)
        self.results.setdefault(f"{self.kind}, CPU", []).append(work)


def evict(folder: Path) -> None:
    """Drop a folder's files from the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def measure(folder: Path, repeats: int, mebibytes: int) -> dict[str, dict[str, list[float]]]:
    torch.manual_seed(0)
    parameters = make_parameters(mebibytes)
    empty = {name: torch.nn.Parameter(torch.zeros_like(each)) for name, each in parameters.items()}
    systems = {
        "lme-parallel": Ours(folder / "ours"),
        "DCP, 1 thread": Theirs(folder / "one", 1),
        "DCP, 2 threads": Theirs(folder / "two", 2),
    }
    seconds: dict[str, dict[str, list[float]]] = {name: {} for name in systems}
    for _ in range(repeats):
        for name, system in systems.items():
            shutil.rmtree(system.folder, ignore_errors=True)
            os.sync()
            with Timer(seconds[name], "save"):
                system.save(parameters)
            for kind in ("load warm", "load cold"):
                if kind == "load cold":
                    evict(system.folder)
                for each in empty.values():
                    each.detach().zero_()
                with Timer(seconds[name], kind):
                    system.load(empty)
                for parameter, each in parameters.items():
                    assert torch.equal(each, empty[parameter]), parameter
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--mebibytes", type=int, default=1024)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        seconds = measure(Path(folder), arguments.repeats, arguments.mebibytes)
    kinds = ("save", "save, CPU", "load warm", "load warm, CPU", "load cold", "load cold, CPU")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, seconds")
    print("median (min to max)")
    print("| | " + " | ".join(kinds) + " |")
    print("| --- " * (len(kinds) + 1) + "|")
    for name, each in seconds.items():
        cells = [
            f"{statistics.median(each[kind]):.2f} ({min(each[kind]):.2f} to {max(each[kind]):.2f})"
            for kind in kinds
        ]
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
