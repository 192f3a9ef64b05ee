"""What `lme data` shows and does besides tokenising."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from lme_cli.errors import CommandError
from lme_cli.loading import load_run
from lme_data.indexed import IndexedTokens
from lme_data.manifest import Manifest, read_manifest
from lme_data.tokenizer import TextTokenizer
from lme_data.writer import IndexedWriter

_IGNORED = -100


def inspect_pair(prefix: Path) -> list[tuple[str, str]]:
    """Describe a `.bin/.idx` pair in names and values."""
    pair = IndexedTokens(prefix)
    rows = [
        ("documents", f"{len(pair.document_bounds) - 1:,}"),
        ("sequences", f"{pair.num_sequences:,}"),
        ("tokens", f"{pair.num_tokens:,}"),
        ("dtype", str(pair.dtype)),
    ]
    if pair.num_sequences:
        low, middle, high = np.quantile(pair.lengths, [0.0, 0.5, 1.0])
        rows.append(("tokens/sequence", f"{low:.0f} least, {middle:.0f} median, {high:.0f} most"))
    manifest = read_manifest(prefix)
    if manifest is None:
        return [*rows, ("manifest", "none; `lme data tokenize` writes one")]
    rows.append(("ids", f"{manifest.smallest_id} to {manifest.largest_id}"))
    if manifest.tokenizer is not None:
        info = manifest.tokenizer
        rows.append(("tokenizer", f"{info.name}, {info.vocab_size:,} ids, sha256 {info.sha256}"))
        rows.append(("end of text", str(info.eos_token_id)))
    return rows


def merge_pairs(prefixes: Sequence[Path], output: Path) -> Manifest:
    """Write several pairs as one.

    Raises:
        CommandError: If a pair would be overwritten, or tokenizers differ.
    """
    if output in prefixes:
        raise CommandError(f"`--output-prefix` {output} is one of the pairs to merge")
    manifests = [read_manifest(each) for each in prefixes]
    tokenizers = [each.tokenizer for each in manifests if each is not None and each.tokenizer]
    if len({each.sha256 for each in tokenizers}) > 1:
        raise CommandError(
            "the pairs were made with different tokenizers, so ids differ in meaning"
        )
    with IndexedWriter(output, IndexedTokens(prefixes[0]).dtype) as writer:
        for each in prefixes:
            writer.add_pair(each)
        return writer.finalize(tokenizers[0] if len(tokenizers) == len(prefixes) else None)


def preview_rows(
    path: Path, settings: Sequence[str], *, count: int, max_tokens: int
) -> Iterator[str]:
    """Decode the first rows of a run's training data.

    Args:
        path: The run file.
        settings: Each of the form `section.key=value`.
        count: Rows.
        max_tokens: Tokens of a row.

    Yields:
        One text a row; what is no target stands in brackets.
    """
    from lme_cli.compose import open_data
    from lme_cli.planning import make_plan
    from lme_cli.run_tokenizer import find_tokenizer

    loaded = load_run(path, settings)
    plan = make_plan(loaded.run)
    tokenizer = find_tokenizer(loaded.run, plan.opened)
    plan = dataclasses.replace(plan, checkpoint=None)
    loaders = open_data(plan, tokenizer)
    shown = 0
    for batch in loaders.train:
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
            if shown == count:
                return
            shown += 1
            targets = int((labels != _IGNORED).sum())
            head = f"--- row {shown}: {len(ids)} tokens, {targets} targets ---"
            body = _decode(ids.tolist()[:max_tokens], labels.tolist()[:max_tokens], tokenizer)
            yield f"{head}\n{body}"


def _decode(ids: list[int], labels: list[int], tokenizer: TextTokenizer | None) -> str:
    """Write a row's tokens; a run of tokens that predict nothing stands in brackets."""
    parts: list[str] = []
    start = 0
    for end in range(1, len(ids) + 1):
        is_edge = end == len(ids) or (labels[end] == _IGNORED) != (labels[start] == _IGNORED)
        if not is_edge:
            continue
        text = (
            " ".join(map(str, ids[start:end]))
            if tokenizer is None
            else tokenizer.decode(ids[start:end])
        )
        parts.append(f"[[{text}]]" if labels[start] == _IGNORED else text)
        start = end
    return "".join(parts)
