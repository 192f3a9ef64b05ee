"""Corpora and tokenizers small enough to build in every test."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from lme_data.manifest import TokenizerInfo
from lme_data.tokenizer import TextTokenizer, train_byte_level_bpe
from lme_data.writer import IndexedWriter


@pytest.fixture
def write_corpus(tmp_path: Path) -> Callable[..., str]:
    """Write documents of the given lengths; token t of the corpus is `first + t % modulus`."""

    def write(
        lengths: Sequence[int],
        name: str = "corpus",
        *,
        modulus: int = 60_000,
        first: int = 0,
        dtype: str = "<u2",
        tokenizer: TokenizerInfo | None = None,
    ) -> str:
        prefix = str(tmp_path / name)
        tokens = first + np.arange(sum(lengths)) % modulus
        with IndexedWriter(prefix, np.dtype(dtype)) as writer:
            writer.add_documents(tokens, np.array(lengths, np.int64))
            writer.finalize(tokenizer)
        return prefix

    return write


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    """A byte-level BPE of 300 tokens, trained on this file."""
    text = tmp_path_factory.mktemp("text") / "sample.txt"
    text.write_text(Path(__file__).read_text())
    return train_byte_level_bpe(
        [text],
        vocab_size=300,
        special_tokens=[
            "<|endoftext|>",
            "<fim_prefix>",
            "<fim_middle>",
            "<fim_suffix>",
            "<fim_pad>",
        ],
    )
