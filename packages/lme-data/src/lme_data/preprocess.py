"""Text to `.bin/.idx`: many processes, constant memory, the same bytes however often it is killed."""

import collections
import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from lme_data.atomic import write_json_atomically
from lme_data.encoding import EncodedBatch, Encoder, EncoderProcesses
from lme_data.indexed import idx_path, token_dtype
from lme_data.manifest import Manifest, TokenizerInfo, read_manifest
from lme_data.text_inputs import Documents, InputBatch, InputPosition, list_inputs, read_batches
from lme_data.tokenizer import TextTokenizer
from lme_data.writer import IndexedWriter, WriterPosition

logger = logging.getLogger(__name__)

STATE_VERSION = 1
"""Version of the file that keeps an unfinished job's position."""

_SECONDS_BETWEEN_STATES = 5.0
_BATCHES_PER_PROCESS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizeProgress:
    """How far a job is."""

    bytes_done: int
    """Bytes of input files read and tokenised, those of an earlier start included."""
    bytes_total: int
    """Bytes of all input files."""
    num_documents: int
    """Documents written."""
    num_tokens: int
    """Tokens written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizeReport:
    """What a job wrote and what it left out."""

    prefixes: dict[str, str]
    """Prefix of the pair of each key."""
    manifests: dict[str, Manifest]
    """Manifest of each pair, by key."""
    num_files: int
    """Files read."""
    num_documents: int
    """Documents written, all keys together."""
    num_tokens: int
    """Tokens written, all keys together."""
    num_unreadable: int
    """Lines left out because they were no JSON object."""
    num_missing: int
    """Documents left out because they lacked a key."""
    num_empty: int
    """Texts left out because they gave no token."""
    was_resumed: bool
    """Whether an unfinished job was taken up."""


def tokenize_files(
    inputs: Sequence[str | Path],
    output_prefix: str | Path,
    tokenizer: TextTokenizer,
    *,
    json_keys: Sequence[str] = ("text",),
    append_eod: bool = False,
    documents: Documents = "file",
    add_special_tokens: bool = True,
    num_processes: int = 0,
    on_progress: Callable[[TokenizeProgress], object] | None = None,
) -> TokenizeReport:
    """Tokenise text files into `.bin/.idx` pairs with manifests.

    Reads JSON lines (`.jsonl`, `.json`, `.ndjson`, also `.gz` and `.zst`), parquet, and any other
    file as text. One text is one document of one sequence; documents keep the order of the input.
    A job that was stopped goes on where it was when it is started again with the same arguments,
    and gives the same bytes; with other arguments it starts anew.

    Args:
        inputs: Files and folders; folders are walked in sorted order, hidden files left out.
        output_prefix: Prefix of the pair; with several keys, `<prefix>_<key>` each.
        tokenizer: Encodes.
        json_keys: Keys of JSON objects and parquet columns, one pair each.
        append_eod: End each document with the tokenizer's end-of-text token.
        documents: What one document of a text file is: the file, a paragraph (between empty
            lines), or a line.
        add_special_tokens: Let the tokenizer add what its template asks for.
        num_processes: Processes that encode; 0 encodes in this one, on the library's threads.
        on_progress: Called after each batch.

    Returns:
        What was written and what was left out.

    Raises:
        ValueError: If an input is missing or unreadable, no document is found, or `append_eod` is
            asked of a tokenizer without end-of-text token.
    """
    if append_eod and tokenizer.eos_token_id is None:
        raise ValueError(
            f"`append_eod`: the tokenizer {tokenizer.name!r} has no end-of-text token; name one in "
            "its tokenizer_config.json"
        )
    if not json_keys or len(set(json_keys)) < len(json_keys):
        raise ValueError(f"`json_keys` must be one or more distinct keys, got {list(json_keys)}")
    if num_processes < 0:
        raise ValueError(f"`num_processes` must be 0 or more, got {num_processes}")
    files = list_inputs(inputs)
    job = _Job(
        files=files,
        keys=list(json_keys),
        prefixes={
            key: str(output_prefix) if len(json_keys) == 1 else f"{output_prefix}_{key}"
            for key in json_keys
        },
        state_path=Path(f"{output_prefix}.tokenize.json"),
        tokenizer=tokenizer,
        append_eod=append_eod,
        documents=documents,
        add_special_tokens=add_special_tokens,
    )
    return job.run(num_processes, on_progress)


@dataclass(slots=True)
class _State:
    """What is kept of an unfinished job."""

    position: InputPosition
    writers: dict[str, WriterPosition]
    bytes_done: int = 0
    num_tokens: int = 0
    num_unreadable: int = 0
    num_missing: int = 0
    num_empty: int = 0
    is_all_read: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    files: list[Path]
    keys: list[str]
    prefixes: dict[str, str]
    state_path: Path
    tokenizer: TextTokenizer
    append_eod: bool
    documents: Documents
    add_special_tokens: bool

    def run(
        self, num_processes: int, on_progress: Callable[[TokenizeProgress], object] | None
    ) -> TokenizeReport:
        state = self._load_state()
        was_resumed = state is not None
        if state is None:
            state = _State(InputPosition(0, 0), {})
        if not state.is_all_read:
            self._encode_all(state, num_processes, on_progress)
        manifests = {key: self._finalize(key, state) for key in self.keys}
        self.state_path.unlink(missing_ok=True)
        num_documents = sum(manifest.num_documents for manifest in manifests.values())
        logger.info("tokenised: documents=%d tokens=%d", num_documents, state.num_tokens)
        return TokenizeReport(
            prefixes=self.prefixes,
            manifests=manifests,
            num_files=len(self.files),
            num_documents=num_documents,
            num_tokens=state.num_tokens,
            num_unreadable=state.num_unreadable,
            num_missing=state.num_missing,
            num_empty=state.num_empty,
            was_resumed=was_resumed,
        )

    def _encode_all(
        self,
        state: _State,
        num_processes: int,
        on_progress: Callable[[TokenizeProgress], object] | None,
    ) -> None:
        bytes_total = sum(path.stat().st_size for path in self.files)
        dtype = token_dtype(self.tokenizer.vocab_size)
        writers = {
            key: IndexedWriter(prefix, dtype, resume_from=state.writers.get(key))
            for key, prefix in self.prefixes.items()
        }
        saved = time.monotonic()
        try:
            for batch, encoded in self._encoded(state.position, num_processes, dtype.str):
                for key, writer in writers.items():
                    writer.add_documents(encoded.tokens[key], encoded.lengths[key])
                    state.num_tokens += len(encoded.tokens[key])
                state.position = batch.end
                state.bytes_done += batch.size
                state.num_unreadable += encoded.num_unreadable
                state.num_missing += encoded.num_missing
                state.num_empty += encoded.num_empty
                if time.monotonic() - saved > _SECONDS_BETWEEN_STATES:
                    self._save_state(state, writers)
                    saved = time.monotonic()
                if on_progress is not None:
                    on_progress(
                        TokenizeProgress(
                            bytes_done=min(state.bytes_done, bytes_total),
                            bytes_total=bytes_total,
                            num_documents=sum(each.num_documents for each in writers.values()),
                            num_tokens=state.num_tokens,
                        )
                    )
            state.is_all_read = True
            self._save_state(state, writers)
        finally:
            for writer in writers.values():
                writer.close()

    def _encoded(
        self, start: InputPosition, num_processes: int, dtype: str
    ) -> Iterator[tuple[InputBatch, EncodedBatch]]:
        """Batches with their ids, in the order of the input, a few of them in work at once."""
        batches = read_batches(self.files, keys=self.keys, documents=self.documents, start=start)
        text = self.tokenizer.backend.to_str()
        eod = self.tokenizer.eos_token_id if self.append_eod else None
        special = self.add_special_tokens
        if num_processes == 0:
            encode = Encoder(text, self.keys, eod=eod, dtype=dtype, add_special_tokens=special)
            for batch in batches:
                yield batch, encode(batch)
            return
        processes = EncoderProcesses(
            num_processes, text, self.keys, eod=eod, dtype=dtype, add_special_tokens=special
        )
        pending: collections.deque[tuple[InputBatch, Future[EncodedBatch]]] = collections.deque()
        with ThreadPoolExecutor(num_processes) as pool:
            try:
                for batch in batches:
                    pending.append((batch, pool.submit(processes, batch)))
                    if len(pending) >= num_processes * _BATCHES_PER_PROCESS:
                        first, future = pending.popleft()
                        yield first, future.result()
                while pending:
                    first, future = pending.popleft()
                    yield first, future.result()
            finally:
                for _, future in pending:
                    future.cancel()
                for _, future in pending:
                    if not future.cancelled():
                        future.exception()
                processes.close()

    def _finalize(self, key: str, state: _State) -> Manifest:
        prefix = self.prefixes[key]
        finished = self._finished(key, state)
        if finished is not None:
            return finished
        info = TokenizerInfo(
            name=self.tokenizer.name,
            sha256=self.tokenizer.fingerprint(),
            vocab_size=self.tokenizer.vocab_size,
            eos_token_id=self.tokenizer.eos_token_id,
        )
        position = state.writers[key]
        if position.num_documents == 0:
            raise ValueError(
                f"no document with text was found for `{key}` in {len(self.files)} files "
                f"({state.num_unreadable} unreadable lines, {state.num_missing} without the key): "
                "check `json_keys` and the files' endings"
            )
        dtype = token_dtype(self.tokenizer.vocab_size)
        with IndexedWriter(prefix, dtype, resume_from=position) as writer:
            return writer.finalize(info)

    def _finished(self, key: str, state: _State) -> Manifest | None:
        """Manifest of a key's pair if this job finished it before it was stopped."""
        prefix, position = self.prefixes[key], state.writers.get(key)
        manifest = read_manifest(prefix) if idx_path(prefix).exists() else None
        if manifest is None or position is None or IndexedWriter.has_unfinished_files(prefix):
            return None
        is_same = (manifest.bin.length, manifest.num_documents) == (
            position.bin_bytes,
            position.num_documents,
        )
        return manifest if is_same else None

    def _fingerprint(self) -> str:
        """Changes with anything that changes the output."""
        files = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in self.files]
        parts = (
            files,
            self.keys,
            self.tokenizer.fingerprint(),
            self.tokenizer.eos_token_id,
            self.append_eod,
            self.documents,
            self.add_special_tokens,
        )
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def _save_state(self, state: _State, writers: dict[str, IndexedWriter]) -> None:
        state.writers = {key: writer.position() for key, writer in writers.items()}
        content = {
            "format_version": STATE_VERSION,
            "fingerprint": self._fingerprint(),
            **asdict(state),
        }
        write_json_atomically(self.state_path, content)

    def _load_state(self) -> _State | None:
        if not self.state_path.exists():
            return None
        try:
            content = json.loads(self.state_path.read_text())
            is_ours = (
                content.pop("format_version") == STATE_VERSION
                and content.pop("fingerprint") == self._fingerprint()
            )
            position = InputPosition(**content.pop("position"))
            writers = {key: WriterPosition(**each) for key, each in content.pop("writers").items()}
            state = _State(position, writers, **content)
        except (ValueError, KeyError, TypeError) as error:
            logger.warning("unfinished job was unreadable and starts anew: %s", error)
            return None
        if not is_ours:
            logger.warning("unfinished job was of other inputs or settings and starts anew")
            return None
        for key, prefix in self.prefixes.items():
            is_there = IndexedWriter.has_unfinished_files(prefix)
            if not is_there and not (state.is_all_read and self._finished(key, state)):
                break
        else:
            return state
        logger.warning("unfinished files of the job were incomplete; it starts anew")
        return None
