"""Bytes per second of `tokenize_files` against the `tokenizers` library alone on the same files.

    python benchmarks/tokenize_text.py --megabytes 40 --processes 1 2 --repeats 3

The text is the Python standard library's source and documentation strings as JSON lines, repeated
to the size asked; the tokenizer is a byte-level BPE of 32k trained on it. "Alone" is N processes
that have the parsed texts in memory and only call `encode_batch`; ours reads, parses, encodes,
checks and writes with N processes. Both times are the wall time of the work, without start-up of
processes and imports, and, where `--cpu` is given, seconds of processor time instead, which other
programs on the machine do not change. Prints Markdown rows.
"""

import argparse
import json
import multiprocessing
import os
import resource
import statistics
import sysconfig
import tempfile
import time
from pathlib import Path

from tokenizers import Tokenizer

from lme_data.preprocess import tokenize_files
from lme_data.tokenizer import TextTokenizer, load_tokenizer, train_byte_level_bpe


def write_text(path: Path, megabytes: int) -> int:
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("**/*.py"))
    files = [file for file in files if "site-packages" not in file.parts]
    size = 0
    with path.open("w") as out:
        while size < megabytes * 1_000_000:
            for file in files:
                text = file.read_text(encoding="utf-8", errors="replace")
                out.write(json.dumps({"text": text}) + "\n")
                size += len(text.encode())
                if size >= megabytes * 1_000_000:
                    break
    return size


def encode_alone(connection: object, tokenizer: str, path: str, part: int, parts: int) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    encode = Tokenizer.from_str(tokenizer)
    lines = Path(path).read_text().splitlines()[part::parts]
    texts = [json.loads(line)["text"] for line in lines]
    connection.send("ready")
    connection.recv()
    wall, cpu = time.perf_counter(), time.process_time()
    for start in range(0, len(texts), 100):
        encode.encode_batch(texts[start : start + 100])
    connection.send((time.perf_counter() - wall, time.process_time() - cpu))


def time_alone(tokenizer: TextTokenizer, path: Path, processes: int) -> tuple[float, float]:
    """Seconds on the clock, and of processor time over all processes."""
    context = multiprocessing.get_context("spawn")
    connections, workers = [], []
    for part in range(processes):
        ours, theirs = context.Pipe()
        arguments = (theirs, tokenizer.backend.to_str(), str(path), part, processes)
        worker = context.Process(target=encode_alone, args=arguments)
        worker.start()
        connections.append(ours)
        workers.append(worker)
    for connection in connections:
        connection.recv()
    wall = time.perf_counter()
    for connection in connections:
        connection.send("go")
    seconds = [connection.recv() for connection in connections]
    wall = time.perf_counter() - wall
    for worker in workers:
        worker.join()
    return wall, sum(cpu for _, cpu in seconds)


def time_ours(tokenizer: TextTokenizer, path: Path, processes: int) -> tuple[float, float]:
    """As `time_alone`; the clock runs from the start of the call, processes included."""
    children, own = resource.getrusage(resource.RUSAGE_CHILDREN), time.process_time()
    wall = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        tokenize_files([path], Path(folder) / "out", tokenizer, num_processes=processes)
        wall = time.perf_counter() - wall
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - children.ru_utime - children.ru_stime
    return wall, cpu + time.process_time() - own


def time_start(tokenizer: TextTokenizer, folder: Path, processes: int) -> tuple[float, float]:
    """What one call costs on a file of one line: processes, imports, files."""
    (folder / "one.jsonl").write_text('{"text": "one"}\n')
    return time_ours(tokenizer, folder / "one.jsonl", processes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=40)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--vocab-size", type=int, default=32_000)
    arguments = parser.parse_args()
    print(
        "| processes | tokenizers alone, wall / CPU | ours, wall / CPU | CPU ratio | wall ratio |"
    )
    print("| --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = write_text(folder / "text.jsonl", arguments.megabytes)
        sample = folder / "sample.txt"
        write_text(sample, min(10, arguments.megabytes))
        train_byte_level_bpe([sample], vocab_size=arguments.vocab_size).save(folder / "tok")
        tokenizer = load_tokenizer(folder / "tok")
        for processes in arguments.processes:
            alone, ours = [], []
            for _ in range(arguments.repeats):
                start = time_start(tokenizer, folder, processes)
                found = time_ours(tokenizer, folder / "text.jsonl", processes)
                ours.append([size / 1e6 / (f - s) for f, s in zip(found, start, strict=True)])
                found = time_alone(tokenizer, folder / "text.jsonl", processes)
                alone.append([size / 1e6 / each for each in found])
            (aw, ac), (ow, oc) = (
                [statistics.median(column) for column in zip(*rows, strict=True)]
                for rows in (alone, ours)
            )
            print(
                f"| {processes} | {aw:.2f} / {ac:.2f} MB/s | {ow:.2f} / {oc:.2f} MB/s | "
                f"{100 * oc / ac:.0f} % | {100 * ow / aw:.0f} % |",
                flush=True,
            )


if __name__ == "__main__":
    main()
