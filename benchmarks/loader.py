"""Tokens per second that the loader delivers, and seconds to build sample indices.

    python benchmarks/loader.py --tokens 500000000 --sequence-length 2048 --repeats 5

Files are written once to a temporary folder, read once to fill the page cache, and timed on one
thread (`num_workers=0`). Rates are given by the clock and by processor time: on a machine that other
programs use too, the second is the one to compare. Prints Markdown rows.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Literal

import numpy as np

from lme_data.blending import greedy_choices
from lme_data.build import build_loaders
from lme_data.dataset import MegatronClassArgs, MegatronDatasetArgs
from lme_data.indexed import IndexedTokens
from lme_data.manifest import TokenizerInfo
from lme_data.sampling import build_sample_index
from lme_data.writer import IndexedWriter

EOS = 0


def write_corpus(prefix: Path, num_tokens: int, mean_length: int) -> None:
    draw = np.random.default_rng(0)
    with IndexedWriter(prefix, np.dtype("<u2")) as writer:
        done = 0
        while done < num_tokens:
            lengths = draw.geometric(
                1 / mean_length, max(1, min(20_000_000 // mean_length, 100_000))
            )
            tokens = draw.integers(1, 50_000, int(lengths.sum()))
            tokens[np.cumsum(lengths) - 1] = EOS
            writer.add_documents(tokens, lengths)
            done += len(tokens)
        # Its end of text lets packed batches be timed without a tokenizer.
        writer.finalize(TokenizerInfo(name="none", sha256="", vocab_size=50_257, eos_token_id=EOS))


def time_loader(
    prefix: Path, arguments: argparse.Namespace, order: Literal["megatron", "stable"], packed: bool
) -> list[list[float]]:
    entry = MegatronDatasetArgs(
        data_name="bench",
        class_args=MegatronClassArgs(
            data_path=str(prefix),
            split="1",
            sequence_length=arguments.sequence_length,
            num_workers=0,
            order=order,
        ),
    )
    batch = arguments.micro_batch_size
    per_batch = batch * arguments.sequence_length
    steps = max(1, int(arguments.seconds * 100e6) // per_batch)
    train = build_loaders(
        [entry],
        micro_batch_size=batch,
        global_batch_size=batch,
        num_training_steps=steps * (arguments.repeats + 1),
        evaluate=False,
        vocab_size=50_257,
        reset_attention_mask=packed,
        reset_position_ids=packed,
    ).train
    for _ in range(steps // 4):
        next(train)
    rates = []
    for _ in range(arguments.repeats):
        with Timer() as timer:
            for _ in range(steps):
                next(train)
        rates.append([steps * per_batch / 1e6 / seconds for seconds in timer.seconds])
    train.close()
    return rates


class Timer:
    """Seconds by the clock and of processor time between enter and exit."""

    def __enter__(self) -> "Timer":
        self._start = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        wall, cpu = self._start
        self.seconds = [time.perf_counter() - wall, time.process_time() - cpu]


def row(what: str, pairs: list[list[float]], unit: str) -> None:
    """Median and range of (by the clock, by processor time) pairs."""
    cells = [
        f"{statistics.median(values):.1f} {unit} ({min(values):.1f} to {max(values):.1f})"
        for values in zip(*pairs, strict=True)
    ]
    print(f"| {what} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=300_000_000)
    parser.add_argument("--sequence-length", type=int, default=2048)
    parser.add_argument("--micro-batch-size", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    print("| what | by the clock | by processor time |\n| --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        for mean_length in (1000, 100, 10):
            prefix = Path(folder) / f"mean-{mean_length}"
            write_corpus(prefix, arguments.tokens, mean_length)
            int(IndexedTokens(prefix).tokens.max())
            for order, packed in (("megatron", False), ("stable", False), ("megatron", True)):
                rates = time_loader(prefix, arguments, order, packed)
                kind = "documents kept apart" if packed else f"{order} order"
                row(
                    f"loader, documents of {mean_length} tokens, {kind}",
                    rates,
                    "M tokens/s",
                )
            prefix.with_name(prefix.name + ".bin").unlink()
        lengths = np.random.default_rng(0).geometric(1 / 700, 10_000_000).astype(np.int32)
        seconds = []
        for repeat in range(arguments.repeats):
            with Timer() as timer:
                build_sample_index(
                    lengths,
                    first_sequence=0,
                    last_sequence=len(lengths),
                    num_samples=3_000_000,
                    sequence_length=arguments.sequence_length,
                    seed=repeat,
                )
            seconds.append(timer.seconds)
        row("sample index of 10 M documents (7.0 G tokens, one epoch)", seconds, "s")
        seconds = []
        for _ in range(arguments.repeats):
            with Timer() as timer:
                greedy_choices([0.2, 0.5, 0.3], 10_000_000)
            seconds.append(timer.seconds)
        row("blend of 3 corpora, 10 M samples", seconds, "s")


if __name__ == "__main__":
    main()
