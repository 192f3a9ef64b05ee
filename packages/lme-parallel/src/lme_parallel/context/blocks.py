"""Attention of some queries to some keys, whose results add up over blocks of keys.

A block's softmax is over its own keys. With the logarithm of its denominator, results of several
blocks merge into that over all; given the final one, so do gradients.

Source: Liu et al. 2023, algorithm 1 (arXiv:2310.01889); Dao 2023, section 3.1 (arXiv:2307.08691).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

# Scores of one step at most: 256 MiB in fp32.
_MOST_SCORES = 2**26


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """Which keys a query sees, and what its scores are."""

    scale: float
    """Factor of the products."""
    window: int | None
    """Tokens that a token sees, itself among them; `None` for all before it."""
    softcap: float | None
    """Bound on the scaled products' magnitude; `None` for none."""


class Block(NamedTuple):
    """Queries and keys in one stretch of the sequence each."""

    query_start: int
    """Place of the first query in the sequence."""
    key_start: int
    """Place of the first key."""
    queries: int
    """Number of queries."""
    keys: int
    """Number of keys."""

    def is_seen(self, window: int | None) -> bool:
        """Say whether any query sees any key, documents aside."""
        if self.key_start >= self.query_start + self.queries:
            return False
        # From the first query to the last key.
        nearest = self.query_start - (self.key_start + self.keys - 1)
        return window is None or nearest < window

    def is_full(self, window: int | None) -> bool:
        """Say whether every query sees every key, documents aside."""
        if self.key_start + self.keys - 1 > self.query_start:
            return False
        return window is None or self.query_start + self.queries - 1 - self.key_start < window


def attend_block(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block: Block,
    rules: Rules,
    documents: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor]:
    """Attend to the keys of one block.

    Args:
        query: Shape (B, S, N, D).
        key: Shape (B, T, K, D).
        value: Shape (B, T, K, D').
        block: Where they are.
        rules: What a query sees.
        documents: Of the queries, shape (B, S), and of the keys, (B, T); `None` where each row is
            one.

    Returns:
        Averages of values, shape (B, S, N, D'), and the logarithm of the sum of exponentials, shape
        (B, S, N); zeros and -inf where a query sees no key. Both in at least fp32.
    """
    compute = torch.promote_types(query.dtype, torch.float32)
    k, v = _by_head(key.to(compute)), _by_head(value.to(compute))
    outputs, sums = [], []
    for rows in _steps(query, block):
        q = _grouped(query[:, rows].to(compute), key.shape[2])
        scores = _bounded(q @ k.mT * rules.scale, rules)
        seen = _seen(block, rows, rules, documents, query.device)
        if seen is not None:
            scores = _hide(scores, seen, query.shape[0])
        largest = scores.amax(-1, keepdim=True)
        largest = largest.masked_fill(largest == float("-inf"), 0.0)
        powers = torch.exp(scores - largest)
        total = powers.sum(-1, keepdim=True)
        outputs.append(_ungrouped(powers @ v / total.clamp(min=1e-30), rows))
        sums.append(_ungrouped(largest + total.log(), rows))
    return torch.cat(outputs, dim=1), torch.cat(sums, dim=1)[..., 0]


def block_gradients(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad: Tensor,
    delta: Tensor,
    sums: Tensor,
    block: Block,
    rules: Rules,
    documents: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what one block adds to the gradients of queries, keys and values.

    Args:
        query: As `attend_block`.
        key: As there.
        value: As there.
        grad: Of the output over all blocks, shape (B, S, N, D').
        delta: Sum over channels of `grad` times that output, shape (B, S, N).
        sums: Logarithm of the sum of exponentials over all blocks, shape (B, S, N).
        block: As there.
        rules: As there.
        documents: As there.

    Returns:
        In the shapes of `query`, `key` and `value`, in at least fp32.
    """
    compute = torch.promote_types(query.dtype, torch.float32)
    K = key.shape[2]
    k, v = _by_head(key.to(compute)), _by_head(value.to(compute))
    key_grad, value_grad, query_grads = torch.zeros_like(k), torch.zeros_like(v), []
    for rows in _steps(query, block):
        q, g = (_grouped(each[:, rows].to(compute), K) for each in (query, grad))
        d, s = (_grouped(each[:, rows, :, None].to(compute), K) for each in (delta, sums))
        scores = _bounded(q @ k.mT * rules.scale, rules)
        weights = torch.exp(scores - s)
        seen = _seen(block, rows, rules, documents, query.device)
        if seen is not None:
            # Where nothing is seen the exponential is infinite, or not a number.
            weights = _hide(weights, seen, query.shape[0], 0.0)
        value_grad += weights.mT @ g
        score_grad = weights * (g @ v.mT - d) * rules.scale
        if rules.softcap is not None:
            score_grad = score_grad * (1.0 - (scores / rules.softcap).square())
        query_grads.append(_ungrouped(score_grad @ k, rows))
        key_grad += score_grad.mT @ q
    return torch.cat(query_grads, dim=1), key_grad.transpose(1, 2), value_grad.transpose(1, 2)


def merge(output: Tensor, sums: Tensor, more: Tensor, more_sums: Tensor) -> tuple[Tensor, Tensor]:
    """Merge results over two sets of keys.

    Args:
        output: Shape (B, S, N, D').
        sums: Shape (B, S, N), -inf where no key was seen.
        more: As `output`.
        more_sums: As `sums`.

    Returns:
        The same over both.
    """
    together = torch.logaddexp(sums, more_sums)
    finite = together.masked_fill(together == float("-inf"), 0.0)
    first, second = (torch.exp(each - finite).unsqueeze(-1) for each in (sums, more_sums))
    return output * first + more * second, together


def _steps(query: Tensor, block: Block) -> Iterator[slice]:
    """Cut the queries so that the scores of one step stay small."""
    B, S, N, _ = query.shape
    rows = max(1, _MOST_SCORES // max(1, B * N * block.keys))
    for start in range(0, S, rows):
        yield slice(start, min(start + rows, S))


def _by_head(x: Tensor) -> Tensor:
    """(B, T, K, D) to (B, K, T, D)."""
    return x.transpose(1, 2)


def _grouped(x: Tensor, K: int) -> Tensor:
    """(B, S, N, D) to (B, K, N / K * S, D): the queries that share keys, one after the other."""
    return x.unflatten(2, (K, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)


def _ungrouped(x: Tensor, rows: slice) -> Tensor:
    """Undo `_grouped`."""
    S = rows.stop - rows.start
    return x.unflatten(2, (-1, S)).permute(0, 3, 1, 2, 4).flatten(2, 3)


def _bounded(scores: Tensor, rules: Rules) -> Tensor:
    return scores if rules.softcap is None else rules.softcap * torch.tanh(scores / rules.softcap)


def _hide(scores: Tensor, seen: Tensor, B: int, value: float = float("-inf")) -> Tensor:
    """Replace what is not seen; `seen` is (1 or B, S, T), the same for all heads."""
    S, T = seen.shape[1:]
    K = scores.shape[1]
    apart = scores.view(B, K, -1, S, T).masked_fill(~seen[:, None, None], value)
    return apart.view_as(scores)


def _seen(
    block: Block,
    rows: slice,
    rules: Rules,
    documents: tuple[Tensor, Tensor] | None,
    device: torch.device,
) -> Tensor | None:
    """Which keys the queries of one step see, (1 or B, S, T); `None` for all."""
    part = Block(
        block.query_start + rows.start, block.key_start, rows.stop - rows.start, block.keys
    )
    seen = None
    if not part.is_full(rules.window):
        places = part.query_start + torch.arange(part.queries, device=device)
        keys = part.key_start + torch.arange(part.keys, device=device)
        distance = places[:, None] - keys
        seen = distance >= 0
        if rules.window is not None:
            seen = seen & (distance < rules.window)
        seen = seen[None]
    if documents is not None:
        of_queries, of_keys = documents
        same = of_queries[:, rows, None] == of_keys[:, None, :]
        seen = same if seen is None else seen & same
    return seen
