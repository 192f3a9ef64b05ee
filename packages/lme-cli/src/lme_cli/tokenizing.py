"""`lme data tokenize`, with its progress shown."""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import cast, get_args

from lme_cli.display import duration
from lme_cli.errors import CommandError
from lme_data.preprocess import TokenizeProgress, tokenize_files
from lme_data.text_inputs import Documents
from lme_data.tokenizer import load_tokenizer

_SECONDS_BETWEEN_LINES = 5.0


def tokenize(
    inputs: Sequence[Path],
    tokenizer: str,
    output_prefix: Path,
    *,
    json_keys: Sequence[str],
    documents: str,
    append_eod: bool,
    num_processes: int,
) -> None:
    """Tokenise text files and say what was written and what was left out.

    Args:
        inputs: Files and folders.
        tokenizer: File, folder or hub name.
        output_prefix: Of the pair.
        json_keys: Keys of JSON objects, or columns.
        documents: What one document of a text file is.
        append_eod: Whether documents end with the end-of-text token.
        num_processes: Processes that encode.

    Raises:
        CommandError: If `documents` is none of the kinds.
    """
    kinds: tuple[str, ...] = get_args(Documents)
    if documents not in kinds:
        raise CommandError(f"`--documents` must be {', '.join(kinds)}, got {documents}")
    shown = _Shown()
    report = tokenize_files(
        inputs,
        output_prefix,
        load_tokenizer(tokenizer),
        json_keys=json_keys,
        append_eod=append_eod,
        documents=cast(Documents, documents),
        num_processes=num_processes,
        on_progress=shown.update,
    )
    shown.close()
    for prefix in report.prefixes.values():
        print(f"{prefix}.bin, .idx")
    print(
        f"{report.num_files:,} files, {report.num_documents:,} documents, "
        f"{report.num_tokens:,} tokens, {shown.seconds:.1f} s"
    )
    for count, what in (
        (report.num_unreadable, "lines were no JSON objects"),
        (report.num_missing, "documents lacked a key"),
        (report.num_empty, "texts gave no token"),
    ):
        if count:
            print(f"left out: {count:,} {what}")


class _Shown:
    """One line that is renewed on a terminal; elsewhere a line every few seconds."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._last = self._started
        self._is_terminal = sys.stderr.isatty()

    @property
    def seconds(self) -> float:
        """Seconds so far."""
        return time.monotonic() - self._started

    def update(self, progress: TokenizeProgress) -> None:
        now = time.monotonic()
        wait = 0.2 if self._is_terminal else _SECONDS_BETWEEN_LINES
        if now - self._last < wait:
            return
        self._last = now
        done, total = progress.bytes_done, max(progress.bytes_total, 1)
        left = self.seconds / max(done, 1) * (total - done)
        text = (
            f"{100 * done / total:.0f} %  {progress.num_documents:,} documents  "
            f"{progress.num_tokens:,} tokens  {done / self.seconds / 1e6:.1f} MB/s  "
            f"{duration(left)} left"
        )
        start, end = ("\r\x1b[2K", "") if self._is_terminal else ("", "\n")
        print(start + text, end=end, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._is_terminal:
            print("\r\x1b[2K", end="", file=sys.stderr, flush=True)
