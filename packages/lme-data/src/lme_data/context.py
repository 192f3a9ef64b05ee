"""What a run tells its datasets."""

from dataclasses import dataclass
from typing import Literal

from lme_data.tokenizer import TextTokenizer

SplitName = Literal["train", "val", "test"]
"""A part of a dataset."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataContext:
    """What a run tells its datasets."""

    seed: int
    """`random_args.seed`; a dataset's own seed wins."""
    tokenizer: TextTokenizer | None = None
    """Needed by text datasets and fill-in-the-middle."""
    vocab_size: int | None = None
    """Token ids must be below it; `None` checks nothing."""
    eos_token_id: int | None = None
    """End of text, if it is known."""
