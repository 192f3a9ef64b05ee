"""Fill-in-the-middle: documents cut in three and put back in another order."""

import hashlib

import numpy as np

from lme_data.tokenizer import TextTokenizer

FIM_TOKENS = ("<fim_prefix>", "<fim_middle>", "<fim_suffix>", "<fim_pad>")
"""What a tokenizer must hold."""


class FillInTheMiddle:
    """Rearranges documents of a row; what it does depends on the seed and the row's place alone.

    Every document of a row (cut at end-of-text tokens) is, with probability `rate`, decoded, cut
    at two characters drawn uniformly, encoded again in three parts, and put in the order prefix
    suffix middle, or with probability `spm_rate` suffix prefix middle. The row is then cut or
    filled to its old length.

    Args:
        tokenizer: Decodes and encodes; must hold `FIM_TOKENS` and an end of text.
        rate: Probability of a document, 0 to 1.
        spm_rate: Share of those in suffix-prefix-middle order, 0 to 1.
        seed: With the place, of all draws.

    Raises:
        ValueError: If a token is missing.

    Source: Bavarian et al. 2022 (arXiv:2207.14255), document-level with PSM and SPM.
    """

    def __init__(
        self, tokenizer: TextTokenizer, *, rate: float, spm_rate: float, seed: int
    ) -> None:
        ids = [tokenizer.token_id(token) for token in FIM_TOKENS]
        missing = [token for token, found in zip(FIM_TOKENS, ids, strict=True) if found is None]
        if missing or tokenizer.eos_token_id is None:
            raise ValueError(
                f"`fim_rate` needs {list(FIM_TOKENS)} and an end-of-text token in the tokenizer, "
                f"missing: {missing or ['end of text']}; add them with "
                "`tokenizer_args.additional_special_tokens`"
            )
        self._prefix, self._middle, self._suffix, self._pad = [found or 0 for found in ids]
        self._eos = tokenizer.eos_token_id
        self._tokenizer = tokenizer
        self._rate = rate
        self._spm_rate = spm_rate
        self._seed = seed

    def __call__(self, tokens: np.ndarray, place: int) -> np.ndarray:
        """Rearrange the documents of one row.

        Args:
            tokens: int64, shape (S + 1,).
            place: The row's place in its corpus's order.

        Returns:
            int64, shape (S + 1,).
        """
        key = hashlib.blake2b(f"lme-data fim:{self._seed}:{place}".encode(), digest_size=32)
        stream = np.random.RandomState(np.frombuffer(key.digest(), "<u4"))
        pieces: list[np.ndarray] = []
        begin = 0
        for end in [*np.flatnonzero(tokens == self._eos).tolist(), len(tokens)]:
            if end > begin:
                pieces.append(self._maybe_rearrange(tokens[begin:end], stream))
            if end < len(tokens):
                pieces.append(tokens[end : end + 1])
            begin = end + 1
        joined = np.concatenate(pieces)[: len(tokens)]
        filled = np.full(len(tokens), self._pad, np.int64)
        filled[: len(joined)] = joined
        return filled

    def _maybe_rearrange(self, document: np.ndarray, stream: np.random.RandomState) -> np.ndarray:
        if stream.random_sample() >= self._rate:
            return document
        text = self._tokenizer.decode(document.tolist())
        low, high = sorted(stream.randint(0, len(text) + 1, 2).tolist())
        prefix, middle, suffix = (
            self._tokenizer.encode(part) for part in (text[:low], text[low:high], text[high:])
        )
        if stream.random_sample() < self._spm_rate:
            ids = [self._prefix, self._suffix, *suffix, self._middle, *prefix, *middle]
        else:
            ids = [self._prefix, *prefix, self._suffix, *suffix, self._middle, *middle]
        return np.array(ids, np.int64)
