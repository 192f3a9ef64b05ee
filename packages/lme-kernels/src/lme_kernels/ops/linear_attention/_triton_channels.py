"""Decay a channel in Triton: what tokens of a chunk take of each other's keys, and its gradient.

The factor of a pair of tokens differs by channel, so it goes into both sides of a product, each as
the decay to or from a token between them: the first of 16 for what comes before them, the last for
what comes after. Pairs among the 16 themselves are multiplied one by one. Nothing is divided by a
decay, and nothing overflows.
"""

import triton
import triton.language as tl
from torch import Tensor

from lme_kernels._triton_chunks import (
    Slots,
    as_tokens,
    block_of,
    load_columns,
    load_rows,
    precision_of,
    slot_of,
    store_rows,
)
from lme_kernels._triton_launch import thin_launch
from lme_kernels.ops.linear_attention._triton_states import load_channels
from lme_kernels.ops.linear_attention.settings import ChunkSettings
from lme_kernels.tuning import ceil_div


@thin_launch
@triton.jit(do_not_specialize=["S", "count"])
def _scores_kernel(
    query_ptr,
    key_ptr,
    decay_ptr,
    table_ptr,
    scores_ptr,
    S,
    count,
    scale,
    query_stride,
    query_head,
    key_stride,
    key_head,
    N: tl.constexpr,
    K: tl.constexpr,
    QUERY_GROUP: tl.constexpr,
    KEY_GROUP: tl.constexpr,
    PACKED: tl.constexpr,
    INCLUSIVE: tl.constexpr,
    PRECISION: tl.constexpr,
    C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Scores of 16 tokens of a chunk, times `scale`."""
    parts: tl.constexpr = C // 16
    part = tl.program_id(0) % parts
    program = tl.program_id(0) // parts
    head, slot = program % N, (program // N).to(tl.int64)
    start, length = slot_of(table_ptr, slot, count, S, C, PACKED)
    query_ptr += (head // QUERY_GROUP).to(tl.int64) * query_head
    key_ptr += (head // KEY_GROUP).to(tl.int64) * key_head
    own = decay_ptr + (slot * N + head) * (C * K)
    begin = part * 16
    row = begin + tl.arange(0, 16)[:, None]
    channel = tl.arange(0, BLOCK_K)
    query = load_rows(query_ptr, start + begin, length - begin, query_stride, 0, 16, K, BLOCK_K)
    dtype = query.dtype
    query = query.to(tl.float32) * scale
    reached = load_channels(own, row if INCLUSIVE else row - 1, channel[None, :], K)
    anchor = load_channels(own, begin - 1, channel, K)
    key = load_columns(key_ptr, start, length, key_stride, 0, C, K, BLOCK_K).to(tl.float32)
    column = tl.arange(0, C)[None, :]
    until = load_channels(own, column, channel[:, None], K)
    key *= tl.exp(tl.where(column < begin, anchor[:, None] - until, -float("inf")))
    ours = (query * tl.exp(reached - anchor[None, :])).to(dtype)
    scores = tl.dot(ours, key.to(dtype), input_precision=PRECISION)
    for each in range(16):
        other = begin + each
        key_ptrs = key_ptr + (start + other) * key_stride + channel
        here = (channel < K) & (channel * 0 + other < length)
        one = tl.load(key_ptrs, mask=here, other=0.0).to(tl.float32)
        gap = reached - load_channels(own, other, channel, K)[None, :]
        pairs = tl.sum(query * one[None, :] * tl.exp(tl.minimum(gap, 0.0)), axis=1)
        seen = row >= other if INCLUSIVE else row > other
        scores = tl.where((column == other) & seen, pairs[:, None], scores)
    store_rows(scores_ptr, scores, (slot * N + head) * C + begin, 16, C, 0, 16, C, C)


def channel_scores(
    query: Tensor,
    key: Tensor,
    decay: Tensor,
    scale: float,
    inclusive: bool,
    slots: Slots,
) -> Tensor:
    """Compute what each token takes of each key of its chunk, times `scale`.

    Args:
        query: Shape (B, S, heads, K) or (T, heads, K).
        key: Likewise.
        decay: Sums from `sum_channel_decays`.
        scale: Factor of the scores.
        inclusive: Whether a token sees itself.
        slots: The chunks.

    Returns:
        Tokens down and keys across, shape (slots, N, chunk, chunk), dtype of `query`.
    """
    N, K = decay.shape[1], decay.shape[3]
    scores = query.new_empty((slots.count, N, slots.chunk, slots.chunk))
    if scores.numel() == 0:
        return scores
    query, query_stride, query_head = as_tokens(query)
    key, key_stride, key_head = as_tokens(key)
    _scores_kernel[(slots.count * N * (slots.chunk // 16),)](
        query,
        key,
        decay,
        slots.table,
        scores,
        slots.S,
        slots.count,
        scale,
        query_stride,
        query_head,
        key_stride,
        key_head,
        N=N,
        K=K,
        QUERY_GROUP=N // query.shape[-2],
        KEY_GROUP=N // key.shape[-2],
        PACKED=slots.table is not None,
        INCLUSIVE=inclusive,
        PRECISION=precision_of(query.dtype),
        C=slots.chunk,
        BLOCK_K=block_of(K),
        num_warps=8 if K > 128 else 4,
    )
    return scores


@triton.jit
def _of_part(
    query_ptr,
    key_ptr,
    own,
    grad_ptr,
    start,
    length,
    query_stride,
    key_stride,
    begin,
    first,
    K: tl.constexpr,
    INCLUSIVE: tl.constexpr,
    PRECISION: tl.constexpr,
    C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Gradients of the queries and keys of 16 tokens through their scores with other tokens."""
    dtype = query_ptr.dtype.element_ty
    row, every = begin + tl.arange(0, 16)[:, None], tl.arange(0, C)[:, None]
    channel = first + tl.arange(0, BLOCK_K)[None, :]
    until = load_channels(own, row, channel, K)
    reached = load_channels(own, row if INCLUSIVE else row - 1, channel, K)
    # Keys before the 16, as seen by the first of them.
    before = load_channels(own, begin - 1, channel, K)
    key = load_rows(key_ptr, start, length, key_stride, first, C, K, BLOCK_K).to(tl.float32)
    gap = before - load_channels(own, every, channel, K)
    key *= tl.exp(tl.where(every < begin, gap, -float("inf")))
    grads = tl.load(grad_ptr + row * C + tl.arange(0, C)[None, :])
    grad_query = tl.dot(grads, key.to(dtype), input_precision=PRECISION)
    grad_query *= tl.exp(reached - before)
    # Queries after the 16, as they see the last of them.
    after = load_channels(own, begin + 15, channel, K)
    query = load_rows(query_ptr, start, length, query_stride, first, C, K, BLOCK_K).to(tl.float32)
    gap = load_channels(own, every if INCLUSIVE else every - 1, channel, K) - after
    query *= tl.exp(tl.where(every >= begin + 16, gap, -float("inf")))
    grads = tl.load(grad_ptr + tl.arange(0, C)[None, :] * C + row)
    grad_key = tl.dot(grads, query.to(dtype), input_precision=PRECISION)
    grad_key *= tl.exp(after - until)
    for each in range(16):
        other = begin + each
        token, here = start + other, (channel < K) & (channel * 0 + other < length)
        its_key = tl.load(key_ptr + token * key_stride + channel, mask=here, other=0.0)
        its_query = tl.load(query_ptr + token * query_stride + channel, mask=here, other=0.0)
        grad = tl.load(grad_ptr + row * C + other).to(tl.float32)
        kept = tl.exp(tl.minimum(reached - load_channels(own, other, channel, K), 0.0))
        grad_query += tl.where(row > other, grad, 0.0) * its_key.to(tl.float32) * kept
        grad = tl.load(grad_ptr + other * C + row).to(tl.float32)
        its_reach = load_channels(own, other if INCLUSIVE else other - 1, channel, K)
        kept = tl.exp(tl.minimum(its_reach - until, 0.0))
        grad_key += tl.where(row < other, grad, 0.0) * its_query.to(tl.float32) * kept
    return grad_query, grad_key


@thin_launch
@triton.jit(do_not_specialize=["S", "count"])
def _channel_gradients_kernel(
    query_ptr,
    key_ptr,
    decay_ptr,
    grad_scores_ptr,
    kept_ptr,
    table_ptr,
    through_query_ptr,
    through_key_ptr,
    grad_query_ptr,
    grad_key_ptr,
    grad_decay_ptr,
    S,
    count,
    query_stride,
    query_head,
    key_stride,
    key_head,
    N: tl.constexpr,
    K: tl.constexpr,
    QUERY_GROUP: tl.constexpr,
    KEY_GROUP: tl.constexpr,
    PACKED: tl.constexpr,
    INCLUSIVE: tl.constexpr,
    PRECISION: tl.constexpr,
    C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    blocks: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    first = (tl.program_id(0) % blocks) * BLOCK_K
    program = tl.program_id(0) // blocks
    head, slot = program % N, (program // N).to(tl.int64)
    start, length = slot_of(table_ptr, slot, count, S, C, PACKED)
    query_ptr += (head // QUERY_GROUP).to(tl.int64) * query_head
    key_ptr += (head // KEY_GROUP).to(tl.int64) * key_head
    own = decay_ptr + (slot * N + head) * (C * K)
    grad_scores_ptr += (slot * N + head) * (C * C)
    through_query_ptr += head * K
    through_key_ptr += head * K
    grad_query_ptr += head * K
    grad_key_ptr += head * K
    grad_decay_ptr += head * K
    channel = first + tl.arange(0, BLOCK_K)
    # The decay of a token acts on the state before the chunk, on what tokens from it on read of
    # that, on earlier keys that reach the end, and on pairs of an earlier key and a query from it
    # on. Only the last is a difference of longer sums, without the pairs of tokens with themselves.
    whole = tl.load(kept_ptr + (slot * N + head) * K + channel, mask=channel < K, other=0.0)
    by_keys = load_rows(key_ptr, start, length, key_stride, first, C, K, BLOCK_K).to(tl.float32)
    by_keys *= load_rows(through_key_ptr, start, length, N * K, first, C, K, BLOCK_K).to(tl.float32)
    every = tl.arange(0, C)[:, None]
    later = tl.zeros((BLOCK_K,), dtype=tl.float32)
    for step in range(C // 16):
        begin = C - 16 - step * 16
        left = length - begin
        token = start + begin
        grad_query, grad_key = _of_part(
            query_ptr, key_ptr, own, grad_scores_ptr, start, length, query_stride, key_stride,
            begin, first, K, INCLUSIVE, PRECISION, C, BLOCK_K,
        )  # fmt: skip
        query = load_rows(query_ptr, token, left, query_stride, first, 16, K, BLOCK_K).to(
            tl.float32
        )
        key = load_rows(key_ptr, token, left, key_stride, first, 16, K, BLOCK_K).to(tl.float32)
        read = load_rows(through_query_ptr, token, left, N * K, first, 16, K, BLOCK_K)
        left_over = load_rows(through_key_ptr, token, left, N * K, first, 16, K, BLOCK_K)
        read, left_over = read.to(tl.float32), left_over.to(tl.float32)
        by_query = (read + grad_query) * query
        difference = by_query - grad_key * key
        reaching = left_over * key
        grad_decay = tl.cumsum(difference, axis=0, reverse=True) + later[None, :]
        grad_decay += tl.cumsum(reaching, axis=0) - reaching
        grad_decay += (whole + tl.sum(tl.where(every < begin, by_keys, 0.0), axis=0))[None, :]
        later += tl.sum(difference, axis=0)
        grad_query += read
        grad_key += left_over
        if INCLUSIVE:
            row = begin + tl.arange(0, 16)[:, None]
            alone = tl.load(grad_scores_ptr + row * (C + 1)).to(tl.float32)
            grad_query += alone * key
            grad_key += alone * query
        else:
            # A token does not read with its own decay.
            grad_decay -= by_query
        store_rows(grad_query_ptr, grad_query, token, left, N * K, first, 16, K, BLOCK_K)
        store_rows(grad_key_ptr, grad_key, token, left, N * K, first, 16, K, BLOCK_K)
        store_rows(grad_decay_ptr, grad_decay, token, left, N * K, first, 16, K, BLOCK_K)


def add_channel_gradients(
    query: Tensor,
    key: Tensor,
    decay: Tensor,
    grad_scores: Tensor,
    kept: Tensor,
    through: tuple[Tensor, Tensor],
    grads: tuple[Tensor, Tensor, Tensor],
    inclusive: bool,
    slots: Slots,
    settings: ChunkSettings,
) -> None:
    """Add what goes through scores to the gradients of queries and keys, and write the decay's.

    Args:
        query: Shape (B, S, heads, K) or (T, heads, K).
        key: Likewise.
        decay: Sums from `sum_channel_decays`.
        grad_scores: Gradients of the scores times `scale`, masked, shape (slots, N, chunk, chunk).
        kept: What the decay of a whole chunk gets through the state before it, float32, shape
            (slots, N, K).
        through: Gradients of queries and keys through states, shape (..., N, K), contiguous.
        grads: Where to write the gradients of queries, keys and the decay, likewise.
        inclusive: Whether a token sees itself.
        slots: The chunks.
        settings: How to launch.
    """
    N, K = decay.shape[1], decay.shape[3]
    if decay.numel() == 0:
        return
    query, query_stride, query_head = as_tokens(query)
    key, key_stride, key_head = as_tokens(key)
    _channel_gradients_kernel[(slots.count * N * ceil_div(K, settings.block_key),)](
        query,
        key,
        decay,
        grad_scores,
        kept,
        slots.table,
        *through,
        *grads,
        slots.S,
        slots.count,
        query_stride,
        query_head,
        key_stride,
        key_head,
        N=N,
        K=K,
        QUERY_GROUP=N // query.shape[-2],
        KEY_GROUP=N // key.shape[-2],
        PACKED=slots.table is not None,
        INCLUSIVE=inclusive,
        PRECISION=precision_of(query.dtype),
        C=slots.chunk,
        BLOCK_K=settings.block_key,
        num_warps=settings.num_warps,
        num_stages=settings.num_stages,
    )
