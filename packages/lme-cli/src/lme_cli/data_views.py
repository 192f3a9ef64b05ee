"""What `lme data` shows and does besides tokenising."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from lme_cli.loading import load_run
from lme_data.merging import inspect_corpus, preview
from lme_data.tokenizer import TextTokenizer, load_tokenizer

_IGNORED = -100


def describe_pair(prefix: Path) -> list[tuple[str, str]]:
    """Describe a `.bin/.idx` pair in names and values."""
    found = inspect_corpus(prefix)
    rows = [
        ("documents", f"{found.num_documents:,}"),
        ("sequences", f"{found.num_sequences:,}, {found.num_empty:,} of them empty"),
        ("tokens", f"{found.num_tokens:,} ({found.dtype}, {found.bin_bytes:,} bytes)"),
        (
            "lengths",
            f"{found.shortest:,} least, {found.median:,.0f} median, {found.mean:,.1f} mean, "
            f"{found.longest:,} most",
        ),
        ("ids", f"{found.smallest_id} to {found.largest_id}"),
    ]
    if not found.has_manifest:
        return [*rows, ("manifest", "none; `lme data tokenize` writes one")]
    if found.tokenizer is not None:
        info = found.tokenizer
        rows.append(("tokenizer", f"{info.name}, {info.vocab_size:,} ids, sha256 {info.sha256}"))
        rows.append(("end of text", str(info.eos_token_id)))
    return rows


def preview_documents(
    prefix: Path, tokenizer: str | None, *, count: int, max_tokens: int
) -> Iterator[str]:
    """Decode the first documents of a pair.

    Args:
        prefix: The pair.
        tokenizer: What decodes; ids are shown without one.
        count: Documents.
        max_tokens: Tokens of each.
    """
    loaded = None if tokenizer is None else load_tokenizer(tokenizer)
    documents = range(min(count, inspect_corpus(prefix).num_documents))
    shown = preview(prefix, loaded, documents=documents, max_tokens=max_tokens)
    for number, text in enumerate(shown):
        yield f"--- document {number} ---\n{text}"


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
    from lme_cli.planning import make_plan
    from lme_cli.run_data import open_data
    from lme_cli.run_tokenizer import find_tokenizer

    loaded = load_run(path, settings)
    plan = make_plan(loaded.run)
    tokenizer = find_tokenizer(loaded.run, plan.opened)
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
