"""What is trained: a model, its batch in tokens, and text that it can learn."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from async_save import MODEL
from train_step import README_MODEL

from lme_data.writer import IndexedWriter

TINY_MODEL = {
    "model_type": "gpt_base",
    "vocab_size": 128,
    "hidden_size": 32,
    "num_layers": 4,
    "position_embedding_type": "rope",
    "normalization_function": "rmsnorm",
    "sequence_mixer_blocks": [
        {
            "sequence_mixer_type": "softmax_attention",
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        }
    ],
    "mlp_blocks": [{"mlp_type": "MLP", "activation_function": "swiglu", "intermediate_size": 64}],
}
WORDS = 2000


@dataclass(frozen=True, slots=True)
class Case:
    """A model and the batch of a step, the same in every layout."""

    name: str
    model: dict[str, Any]
    sequence: int
    rows: int
    """Sequences of a step, over all GPUs."""
    micro_batch: int
    """Sequences that a GPU runs at once; a process that sees all rows runs more of them."""
    pipeline_micro_batch: int
    """The same in a pipeline, which wants many."""
    learning_rate: float
    steps: int = 50

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.rows * self.sequence


CASES = {
    each.name: each
    for each in (
        Case("readme", README_MODEL, 2048, 32, 16, 4, 6e-4),
        Case("1b", MODEL, 4096, 8, 4, 1, 3e-4),
        Case("tiny", TINY_MODEL, 32, 8, 4, 2, 1e-2),
    )
}


def write_language(prefix: Path, case: Case, steps: int) -> None:
    """Write the tokens of so many steps: nine in ten follow from the one before.

    Args:
        prefix: Of the pair of files; nothing happens if it is there.
        case: Gives the vocabulary and the batch.
        steps: Of the longest run; longer ones read the same again.
    """
    if prefix.with_suffix(".idx").exists():
        return
    words = min(WORDS, case.model["vocab_size"])
    random = np.random.default_rng(0)
    follows = random.permutation(words)
    documents, length = case.rows * steps, case.sequence + 1
    tokens = np.empty((documents, length), np.uint16)
    tokens[:, 0] = random.integers(words, size=documents)
    for column in range(1, length):
        other = random.integers(words, size=documents)
        is_noise = random.random(documents) < 0.1
        tokens[:, column] = np.where(is_noise, other, follows[tokens[:, column - 1]])
    with IndexedWriter(prefix, np.dtype("uint16")) as writer:
        writer.add_documents(tokens.reshape(-1), np.full(documents, length))
        writer.finalize()
