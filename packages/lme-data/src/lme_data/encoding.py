"""What a tokenising process does: parse a batch of documents, encode them, hand back arrays."""

import json
import multiprocessing
import os
import queue
import signal
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection

import numpy as np
from tokenizers import Tokenizer

from lme_data.text_inputs import InputBatch


@dataclass(frozen=True, slots=True)
class EncodedBatch:
    """Documents of one batch as ids, per key."""

    tokens: dict[str, np.ndarray]
    """Ids of all documents, one after another, by key."""
    lengths: dict[str, np.ndarray]
    """Tokens of each document, int64, by key."""
    num_unreadable: int
    """Lines that were no JSON object."""
    num_missing: int
    """Documents that lacked a key or had no text there."""
    num_empty: int
    """Texts that gave no token."""


class Encoder:
    """Encodes batches.

    Args:
        tokenizer: Serialised tokenizer.
        keys: Keys of JSON objects and columns to take; texts of plain files count as the first.
        eod: Appended to every document, if given.
        dtype: dtype of the ids that are handed back.
        add_special_tokens: Let the tokenizer add what its template asks for.
    """

    def __init__(
        self,
        tokenizer: str,
        keys: Sequence[str],
        *,
        eod: int | None,
        dtype: str,
        add_special_tokens: bool,
    ) -> None:
        self._tokenizer = Tokenizer.from_str(tokenizer)
        self._keys = list(keys)
        self._eod = eod
        self._dtype = dtype
        self._add_special_tokens = add_special_tokens

    def __call__(self, batch: InputBatch) -> EncodedBatch:
        """Parse and encode one batch."""
        texts, num_unreadable, num_missing = parse(batch, self._keys)
        tokens: dict[str, np.ndarray] = {}
        lengths: dict[str, np.ndarray] = {}
        num_empty = 0
        for key, documents in texts.items():
            encodings = self._tokenizer.encode_batch_fast(
                documents, add_special_tokens=self._add_special_tokens
            )
            ids, sizes = array("I"), []
            for encoding in encodings:
                found = encoding.ids
                if not found:
                    num_empty += 1
                    continue
                if self._eod is not None:
                    found.append(self._eod)
                ids.extend(found)
                sizes.append(len(found))
            tokens[key] = np.frombuffer(ids, np.uint32).astype(self._dtype)
            lengths[key] = np.array(sizes, np.int64)
        return EncodedBatch(tokens, lengths, num_unreadable, num_missing, num_empty)


def parse(batch: InputBatch, keys: Sequence[str]) -> tuple[dict[str, list[str]], int, int]:
    """Texts of a batch by key, lines that could not be read, and documents without a key.

    Args:
        batch: What was read.
        keys: Keys to take.
    """
    texts: dict[str, list[str]] = {key: [] for key in keys}
    num_unreadable = num_missing = 0
    payload = batch.payload
    if isinstance(payload, dict):
        for key in keys:
            column = payload.get(key, [])
            kept = [text for text in column if isinstance(text, str)]
            num_missing += len(column) - len(kept)
            texts[key] = kept
    elif isinstance(payload, list):
        texts[keys[0]] = [text.decode("utf-8", errors="replace") for text in payload if text]
    else:
        for line in payload.split(b"\n"):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError:
                num_unreadable += 1
                continue
            for key in keys:
                text = row.get(key) if isinstance(row, dict) else None
                if isinstance(text, str):
                    texts[key].append(text)
                else:
                    num_missing += 1
    return texts, num_unreadable, num_missing


class EncoderProcesses:
    """Encoders in processes of their own, called from threads.

    Args:
        num_processes: How many.
        tokenizer: As `Encoder`.
        keys: As `Encoder`.
        eod: As `Encoder`.
        dtype: As `Encoder`.
        add_special_tokens: As `Encoder`.
    """

    def __init__(
        self,
        num_processes: int,
        tokenizer: str,
        keys: Sequence[str],
        *,
        eod: int | None,
        dtype: str,
        add_special_tokens: bool,
    ) -> None:
        # A forked copy of a process with threads may hang; a fresh one cannot.
        context = multiprocessing.get_context("spawn")
        self._idle: queue.SimpleQueue[Connection] = queue.SimpleQueue()
        self._connections: list[Connection] = []
        self._processes = []
        for _ in range(num_processes):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=serve,
                args=(theirs, tokenizer, tuple(keys), eod, dtype, add_special_tokens),
                daemon=True,
            )
            process.start()
            theirs.close()
            self._processes.append(process)
            self._connections.append(ours)
            self._idle.put(ours)

    def __call__(self, batch: InputBatch) -> EncodedBatch:
        """Encode one batch in whichever process is idle; waits for one.

        Raises:
            RuntimeError: If the process died or failed.
        """
        connection = self._idle.get()
        try:
            connection.send(batch)
            result = connection.recv()
        except (EOFError, OSError) as error:
            raise RuntimeError(
                "a tokenising process died, perhaps for lack of memory: run again with fewer "
                "processes; what was done is kept"
            ) from error
        finally:
            self._idle.put(connection)
        if isinstance(result, EncodedBatch):
            return result
        raise RuntimeError(f"a tokenising process failed: {result}")

    def close(self) -> None:
        """End the processes."""
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.join()


def serve(
    connection: Connection,
    tokenizer: str,
    keys: tuple[str, ...],
    eod: int | None,
    dtype: str,
    add_special_tokens: bool,
) -> None:
    """Encode batches from a connection until it is closed; failures are sent as text."""
    # One of several processes that share the cores: one thread each.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # Ctrl-C is for the parent, which closes the connection.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    encode = Encoder(tokenizer, keys, eod=eod, dtype=dtype, add_special_tokens=add_special_tokens)
    while True:
        try:
            batch = connection.recv()
        except (EOFError, OSError):
            return
        try:
            result: EncodedBatch | str = encode(batch)
        except Exception as error:
            # Whatever it is, the parent must hear of it.
            result = f"{type(error).__name__}: {error}"
        connection.send(result)
