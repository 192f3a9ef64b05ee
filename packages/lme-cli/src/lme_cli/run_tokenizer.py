"""A run's tokenizer, and how many bytes of text its tokens stand for."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from lme_cli.config import RunConfig
from lme_convert.api import OpenedModel
from lme_data.tokenizer import TextTokenizer, load_tokenizer


def find_tokenizer(run: RunConfig, opened: OpenedModel | None) -> TextTokenizer | None:
    """Load the tokenizer that a run names, or else the one beside its model.

    Args:
        run: `tokenizer_args` and `model_args` are read.
        opened: The model of `model_args.model_name`, where it was opened.

    Returns:
        The tokenizer; `None` where neither names one, which pretraining does not need.
    """
    special = run.tokenizer_args.additional_special_tokens
    name = run.tokenizer_args.tokenizer_name
    if name is None and opened is not None:
        folder = Path(opened.tokenizer_path)
        if (folder / "tokenizer.json").exists() or run.tuning_args.tuning_method != "pretraining":
            name = str(folder)
    if name is None:
        return None
    return load_tokenizer(name, additional_special_tokens=special)


def bytes_per_target(
    batches: Iterable[Mapping[str, Tensor]], tokenizer: TextTokenizer | None
) -> float | None:
    """Count the mean bytes of text per target token over evaluation batches.

    Args:
        batches: Finite, and the same whenever gone through; `labels` of -100 are no targets.
        tokenizer: What made the tokens.

    Returns:
        Exact for byte-level tokenizers, whose tokens are strings of bytes; `None` for others.
    """
    sizes = None if tokenizer is None else _byte_sizes(tokenizer)
    if sizes is None:
        return None
    total = targets = 0
    for batch in batches:
        labels = batch["labels"]
        chosen = labels[(labels >= 0) & (labels < len(sizes))]
        total += int(sizes[chosen].sum())
        targets += chosen.numel()
    return total / targets if total else None


def _byte_sizes(tokenizer: TextTokenizer) -> Tensor | None:
    """Give the bytes that each id stands for; shape (ids,), int64. Special tokens are none."""
    decoder = tokenizer.backend.decoder
    if decoder is None or type(decoder).__name__ != "ByteLevel":
        return None
    special = tokenizer.backend.get_added_tokens_decoder()
    sizes = torch.zeros(tokenizer.vocab_size, dtype=torch.int64)
    for token, number in tokenizer.backend.get_vocab(with_added_tokens=False).items():
        # In the byte-level alphabet one character stands for one byte.
        sizes[number] = 0 if number in special else len(token)
    return sizes
