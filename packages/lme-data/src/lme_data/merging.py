"""Several pairs into one, and what a pair holds."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lme_data.indexed import IndexedTokens
from lme_data.manifest import Manifest, TokenizerInfo, id_range, read_manifest
from lme_data.tokenizer import TextTokenizer
from lme_data.writer import IndexedWriter


@dataclass(frozen=True, slots=True, kw_only=True)
class CorpusSummary:
    """What a pair holds."""

    prefix: str
    """The pair."""
    dtype: str
    """dtype of the tokens on disk."""
    num_documents: int
    """Documents."""
    num_sequences: int
    """Sequences; a document has one or more."""
    num_tokens: int
    """Tokens."""
    bin_bytes: int
    """Bytes of the tokens."""
    shortest: int
    """Tokens of the shortest sequence."""
    median: float
    """Tokens of the median sequence."""
    mean: float
    """Tokens of a sequence on average."""
    longest: int
    """Tokens of the longest sequence."""
    num_empty: int
    """Sequences without tokens."""
    smallest_id: int | None
    """Smallest token id, `None` of no tokens."""
    largest_id: int | None
    """Largest token id, `None` of no tokens."""
    tokenizer: TokenizerInfo | None
    """From the manifest, if there is one."""
    has_manifest: bool
    """Whether there is a side file."""


def inspect_corpus(prefix: str | Path) -> CorpusSummary:
    """Open a pair and describe it; the ids are read once if there is no manifest.

    Raises:
        FileNotFoundError: If it is missing.
        CorruptDataError: If it contradicts itself.
    """
    pair = IndexedTokens(prefix)
    manifest = read_manifest(prefix)
    if manifest is None:
        smallest, largest = id_range(pair.tokens)
    else:
        smallest, largest = manifest.smallest_id, manifest.largest_id
    lengths = pair.lengths if len(pair) else np.zeros(1, np.int32)
    return CorpusSummary(
        prefix=str(prefix),
        dtype=str(pair.dtype),
        num_documents=pair.num_documents,
        num_sequences=pair.num_sequences,
        num_tokens=pair.num_tokens,
        bin_bytes=pair.num_tokens * pair.dtype.itemsize,
        shortest=int(lengths.min()),
        median=float(np.median(lengths)),
        mean=float(lengths.mean()),
        longest=int(lengths.max()),
        num_empty=int((pair.lengths == 0).sum()),
        smallest_id=smallest,
        largest_id=largest,
        tokenizer=None if manifest is None else manifest.tokenizer,
        has_manifest=manifest is not None,
    )


def count_tokens(prefixes: Sequence[str | Path]) -> dict[str, int]:
    """Tokens of each pair, by prefix; only the indices are read."""
    return {str(prefix): IndexedTokens(prefix).num_tokens for prefix in prefixes}


def preview(
    prefix: str | Path,
    tokenizer: TextTokenizer | None,
    *,
    documents: Sequence[int] = (0,),
    max_tokens: int = 200,
) -> list[str]:
    """First tokens of documents as text, or without a tokenizer as ids.

    Args:
        prefix: The pair.
        tokenizer: Decodes.
        documents: Which.
        max_tokens: Tokens of each.
    """
    pair = IndexedTokens(prefix)
    shown = []
    for document in documents:
        if not 0 <= document < pair.num_documents:
            raise ValueError(f"document must be 0 to {pair.num_documents - 1}, got {document}")
        first, last = pair.document_bounds[document], pair.document_bounds[document + 1]
        ids: list[int] = []
        for sequence in range(int(first), int(last)):
            ids += pair.sequence(sequence, 0, max_tokens - len(ids)).tolist()
            if len(ids) >= max_tokens:
                break
        shown.append(" ".join(map(str, ids)) if tokenizer is None else tokenizer.decode(ids))
    return shown


def merge_corpora(
    prefixes: Sequence[str | Path],
    output_prefix: str | Path,
    on_pair: Callable[[str], object] | None = None,
) -> Manifest:
    """Write one pair that holds the documents of several, in the order given.

    Args:
        prefixes: Pairs of one dtype.
        output_prefix: Of the new pair; must be none of them.
        on_pair: Called with each prefix once it was appended.

    Returns:
        The new manifest; it names a tokenizer if all manifests name the same.

    Raises:
        ValueError: If there are no pairs, dtypes or tokenizers differ, or the output is an input.
    """
    if not prefixes:
        raise ValueError("`prefixes` is empty: give at least one pair to merge")
    if Path(output_prefix).resolve() in {Path(prefix).resolve() for prefix in prefixes}:
        raise ValueError(f"`output_prefix` {output_prefix} is one of the pairs to merge")
    infos = [each.tokenizer if each else None for each in map(read_manifest, prefixes)]
    known = {info.sha256: str(prefix) for info, prefix in zip(infos, prefixes, strict=True) if info}
    if len(known) > 1:
        raise ValueError(
            f"{list(known.values())} were made with different tokenizers: their ids mean different "
            "text and cannot be merged"
        )
    with IndexedWriter(output_prefix, IndexedTokens(prefixes[0]).dtype) as writer:
        for prefix in prefixes:
            writer.add_pair(prefix)
            if on_pair is not None:
                on_pair(str(prefix))
        return writer.finalize(infos[0] if all(infos) else None)
