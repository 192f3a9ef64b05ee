"""Both passes of attention in blocks, of which only this process's keys and values are kept."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lme_parallel.context.blocks import Block, Rules, attend_block, block_gradients, merge
from lme_parallel.context.flash import (
    attend_flash,
    attend_packed,
    flash_gradients,
    is_flash,
    is_flash_block,
    packed_gradients,
)
from lme_parallel.context.layout import Layout
from lme_parallel.context.ring import Ring
from lme_parallel.tensor.collectives import Group


@dataclass(frozen=True, slots=True)
class Call:
    """What one call of attention does, besides its tensors."""

    layout: Layout
    group: Group
    ring: Ring | None
    """Where keys and values go around; `None` where they are collected."""
    rules: Rules


def attend_in_blocks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    cu_seqlens: Tensor | None,
    call: Call,
) -> Tensor:
    """Attend to all earlier tokens, wherever they are.

    Args:
        query: Of the tokens here, shape (B, C, N, D).
        key: Shape (B, C, K, D).
        value: Shape (B, C, K, D').
        sinks: A score for each head that has no value, shape (N,).
        cu_seqlens: Bounds of documents in the B * W * C tokens of the whole rows.
        call: What is done.

    Returns:
        Shape (B, C, N, D'), dtype of `query`.
    """
    return _Attend.apply(query, key, value, sinks, cu_seqlens, call)


@dataclass(frozen=True, slots=True)
class Documents:
    """Documents of whole rows, each as far as it is in a block."""

    number_of_token: Tensor
    """Which document it is of, shape (B, S)."""
    row: Tensor
    """Of each bound, shape (documents + 1,): which row begins or goes on there."""
    place: Tensor
    """Of each bound: where in the row."""

    @classmethod
    def of(cls, query: Tensor, cu_seqlens: Tensor | None, call: Call) -> "Documents | None":
        """Find them; `None` where each row is one.

        Args:
            query: Of the tokens here, shape (B, C, N, D).
            cu_seqlens: Bounds of documents in the B * W * C tokens of the whole rows.
            call: Where tokens are.
        """
        if cu_seqlens is None:
            return None
        B, S = query.shape[0], query.shape[1] * call.layout.size
        tokens = torch.arange(B * S, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
        numbers = torch.searchsorted(cu_seqlens, tokens, right=True).view(B, S)
        row = torch.div(cu_seqlens, S, rounding_mode="floor")
        return cls(numbers, row, cu_seqlens - row * S)

    def numbers(self, block: Block) -> tuple[Tensor, Tensor]:
        """Return which documents queries (B, queries) and keys (B, keys) are of."""
        of_queries = self.number_of_token[:, block.query_start :][:, : block.queries]
        return of_queries, self.number_of_token[:, block.key_start :][:, : block.keys]

    def bounds(self, block: Block) -> tuple[Tensor, Tensor]:
        """Return bounds of documents, int32, over the B * queries and over the B * keys."""
        of_queries = self.row * block.queries
        of_queries = of_queries + (self.place - block.query_start).clamp(0, block.queries)
        of_keys = self.row * block.keys
        of_keys = of_keys + (self.place - block.key_start).clamp(0, block.keys)
        return of_queries.int(), of_keys.int()


class _Visit(NamedTuple):
    """Queries and keys of which the ones may see the others."""

    part: int
    """Which of this process's pieces the queries are."""
    keys: slice
    """Which of the keys that are here."""
    block: Block


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor | None,
        cu_seqlens: Tensor | None,
        call: Call,
    ) -> Tensor:
        packed = torch.cat((key, value), dim=-1)
        parts = query.chunk(call.layout.pieces_each, dim=1)
        documents = Documents.of(query, cu_seqlens, call)
        results: list[tuple[Tensor, Tensor] | None] = [None] * len(parts)

        def add(part: int, more: tuple[Tensor, Tensor]) -> None:
            known = results[part]
            results[part] = more if known is None else merge(*known, *more)

        if call.ring is None:
            whole = _collect(packed, call)
            for visit in _visits_of_whole(parts, call):
                k, v = _split(whole[:, visit.keys], key)
                add(visit.part, _attend(parts[visit.part], k, v, visit.block, call, documents))
        else:
            for rank, theirs in call.ring.visits(packed):
                for visit in _visits_of(rank, parts, call):
                    k, v = _split(theirs[:, visit.keys], key)
                    add(visit.part, _attend(parts[visit.part], k, v, visit.block, call, documents))
        output, sums = (torch.cat(each, dim=1) for each in zip(*_known(results), strict=True))
        if sinks is not None:
            with_sinks = torch.logaddexp(sums, sinks.to(sums.dtype))
            output, sums = output * torch.exp(sums - with_sinks).unsqueeze(-1), with_sinks
        ctx.save_for_backward(query, key, value, sinks, cu_seqlens, output, sums)
        ctx.call = call
        return output.to(query.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride] # one output, one gradient
        call: Call = ctx.call
        query, key, value, sinks, cu_seqlens, output, sums = ctx.saved_tensors
        compute = output.dtype
        packed = torch.cat((key, value), dim=-1)
        delta = (grad.to(compute) * output).sum(-1)
        documents = Documents.of(query, cu_seqlens, call)
        each = call.layout.pieces_each
        of_queries = [
            _OfQueries(*tensors)
            for tensors in zip(
                *(x.chunk(each, dim=1) for x in (query, grad, output, delta, sums)), strict=True
            )
        ]
        parts = [one.query for one in of_queries]
        query_grads = [torch.zeros_like(part, dtype=compute) for part in parts]

        def add(place: Tensor, part: int, more: tuple[Tensor, Tensor, Tensor]) -> None:
            query_grads[part] += more[0]
            place += torch.cat(more[1:], dim=-1)

        packed_grad = torch.zeros_like(packed, dtype=compute)
        if call.ring is None:
            whole = _collect(packed, call)
            whole_grad = torch.zeros_like(whole, dtype=compute)
            for visit in _visits_of_whole(parts, call):
                k, v = _split(whole[:, visit.keys], key)
                more = _gradients(of_queries[visit.part], k, v, visit.block, call, documents)
                add(whole_grad[:, visit.keys], visit.part, more)
            packed_grad = _give_back(whole_grad, call)
        else:
            for rank, theirs, place in call.ring.visits_back(packed, compute):
                packed_grad = place
                for visit in _visits_of(rank, parts, call):
                    k, v = _split(theirs[:, visit.keys], key)
                    more = _gradients(of_queries[visit.part], k, v, visit.block, call, documents)
                    add(place[:, visit.keys], visit.part, more)
        key_grad, value_grad = _split(packed_grad, key)
        sinks_grad = None
        if sinks is not None:
            share = torch.exp(sinks.to(compute) - sums)
            sinks_grad = -(share * delta).sum((0, 1)).to(sinks.dtype)
        return (
            torch.cat(query_grads, dim=1).to(query.dtype),
            key_grad.to(key.dtype),
            value_grad.to(value.dtype),
            sinks_grad,
            None,
            None,
        )


class _OfQueries(NamedTuple):
    """One piece of queries, and what the forward pass and the loss say of it."""

    query: Tensor
    grad: Tensor
    output: Tensor
    delta: Tensor
    sums: Tensor


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block: Block,
    call: Call,
    documents: Documents | None,
) -> tuple[Tensor, Tensor]:
    rules = call.rules
    if _is_flash(query, value, block, rules, documents):
        if documents is None:
            return attend_flash(query, key, value, block, rules)
        return attend_packed(query, key, value, documents.bounds(block), block, rules)
    numbers = None if documents is None else documents.numbers(block)
    return attend_block(query, key, value, block, rules, numbers)


def _gradients(
    one: _OfQueries,
    key: Tensor,
    value: Tensor,
    block: Block,
    call: Call,
    documents: Documents | None,
) -> tuple[Tensor, Tensor, Tensor]:
    rules = call.rules
    query, grad, output, delta, sums = one
    if _is_flash(query, value, block, rules, documents):
        if documents is None:
            return flash_gradients(query, key, value, grad, output, sums, block, rules)
        bounds = documents.bounds(block)
        return packed_gradients(query, key, value, grad, output, sums, bounds, block, rules)
    numbers = None if documents is None else documents.numbers(block)
    return block_gradients(query, key, value, grad, delta, sums, block, rules, numbers)


def _is_flash(
    query: Tensor, value: Tensor, block: Block, rules: Rules, documents: Documents | None
) -> bool:
    fits = is_flash_block(block, rules, packed=documents is not None)
    return fits and is_flash(query, value, rules)


def _visits_of(rank: int, parts: list[Tensor] | tuple[Tensor, ...], call: Call) -> Iterator[_Visit]:
    """List which of a process's keys are seen from here; none of rank -1, which is nobody."""
    if rank < 0:
        return
    length = parts[0].shape[1]
    mine, theirs = (call.layout.starts(length, each) for each in (None, rank))
    for part, start in enumerate(mine):
        for number, first in enumerate(theirs):
            block = Block(start, first, length, length)
            if block.is_seen(call.rules.window):
                yield _Visit(part, slice(number * length, (number + 1) * length), block)


def _visits_of_whole(parts: list[Tensor] | tuple[Tensor, ...], call: Call) -> Iterator[_Visit]:
    """List which keys of the whole sequence are seen from here: those up to the end of a piece."""
    length, window = parts[0].shape[1], call.rules.window
    for part, start in enumerate(call.layout.starts(length)):
        first = 0 if window is None else max(0, start - window + 1)
        stop = start + length
        yield _Visit(part, slice(first, stop), Block(start, first, length, stop - first))


def _collect(packed: Tensor, call: Call) -> Tensor:
    """Collect what all processes have, in the order of the sequence."""
    return call.layout.join(call.group.all_gather(packed[None], 0).unbind())


def _give_back(whole: Tensor, call: Call) -> Tensor:
    """Add up over the processes, and keep what belongs to this one."""
    parts = torch.stack([call.layout.cut(whole, rank) for rank in range(call.layout.size)])
    return call.group.reduce_scatter(parts, 0)[0]


def _split(packed: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Tell keys from values."""
    size = key.shape[-1]
    return packed[..., :size], packed[..., size:]


def _known(results: list[tuple[Tensor, Tensor] | None]) -> list[tuple[Tensor, Tensor]]:
    """Check that each piece saw keys: a token sees itself."""
    found = [each for each in results if each is not None]
    if len(found) != len(results):
        raise RuntimeError("a piece of a sequence met no keys")
    return found
