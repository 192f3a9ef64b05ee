"""Gradients of a chunk in Triton, from the state before it and the gradient of the one after it."""

import triton
import triton.language as tl
from torch import Tensor

from lme_kernels._triton_chunks import (
    Slots,
    as_tokens,
    load_columns,
    load_rows,
    load_state,
    precision_of,
    slot_of,
    store_rows,
)
from lme_kernels._triton_launch import thin_launch
from lme_kernels.ops.linear_attention._triton_outputs import weigh_scores
from lme_kernels.ops.linear_attention._triton_states import (
    exp_of,
    head_decay,
    kind_of_sums,
    load_channels,
)
from lme_kernels.ops.linear_attention.settings import ChunkSettings


@triton.jit
def _store_by_token(
    ptr, numbers, head, start, length, N: tl.constexpr, C: tl.constexpr, GIVEN: tl.constexpr
):
    if GIVEN:
        row = tl.arange(0, C)
        tl.store(ptr + (start + row) * N + head, numbers, mask=row < length)


@triton.jit
def _of_keys(
    query,
    key,
    decay_ptr,
    scores_ptr,
    head,
    slot,
    count,
    scale,
    N: tl.constexpr,
    K: tl.constexpr,
    DECAY: tl.constexpr,
    INCLUSIVE: tl.constexpr,
    PRECISION: tl.constexpr,
    C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Sums of decays, what keys are left with at the end and queries read with, and what passes.

    Which is what each value, down, is multiplied with for each later output, across.
    """
    until, reached, last = 0.0, 0.0, 0.0
    if DECAY == 2:
        row, channel = tl.arange(0, C)[:, None], tl.arange(0, BLOCK_K)[None, :]
        own = decay_ptr + (slot * N + head) * (C * K)
        left_over = load_channels(own, C - 1, channel, K) - load_channels(own, row, channel, K)
        left_over = tl.exp(left_over)
        read = tl.exp(load_channels(own, row if INCLUSIVE else row - 1, channel, K)) * scale
        kept_key = (key.to(tl.float32) * left_over).to(key.dtype)
        passed = load_columns(scores_ptr, (slot * N + head) * C, C, C, 0, C, C, C)
    else:
        left_over, read, kept_key = 1.0, scale, key
        if DECAY == 1:
            until, reached, last = head_decay(decay_ptr, head, slot, count, C, INCLUSIVE)
            left_over = exp_of(last - until)[:, None]
            read = (exp_of(reached) * scale)[:, None]
        passed = tl.dot(key, tl.trans(query), input_precision=PRECISION)
        passed = weigh_scores(passed, until, reached, 0.0, C, DECAY, False, INCLUSIVE, True)
        passed = (passed * scale).to(query.dtype)
    return until, reached, last, left_over, read, kept_key, passed


@triton.jit
def _of_pairs(
    grad_scores,
    grad_query,
    grad_key,
    query,
    key,
    kept,
    until,
    reached,
    last,
    weight,
    DECAY: tl.constexpr,
    HAS_FACTOR: tl.constexpr,
    INCLUSIVE: tl.constexpr,
    PRECISION: tl.constexpr,
    C: tl.constexpr,
):
    """Add what goes through scores to the gradients of queries and keys; and that of the decay."""
    grad_decay = 0.0
    grad_scores = weigh_scores(
        grad_scores, until, reached, weight, C, DECAY, HAS_FACTOR, INCLUSIVE, False
    )
    if DECAY == 1:
        # The decay of a token acts on the state before the chunk, on what tokens from it on read
        # of that, on earlier keys that reach the end, and on pairs of an earlier key and a query
        # from it on. Each is summed by itself: differences of longer sums would round more.
        row, column = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
        pairs = grad_scores * tl.dot(query, tl.trans(key), input_precision=PRECISION)
        pairs = tl.where(row > column, pairs, 0.0)
        later = tl.cumsum(pairs, axis=0, reverse=True)
        by_query = tl.sum(grad_query * query.to(tl.float32), axis=1)
        by_key = tl.sum(grad_key * key.to(tl.float32), axis=1)
        grad_decay = tl.cumsum(by_query, axis=0, reverse=True)
        if not INCLUSIVE:
            # A token does not read with its own decay.
            later -= pairs
            grad_decay -= by_query
        grad_decay += tl.sum(tl.where(row > column, later, 0.0), axis=1)
        grad_decay += exp_of(last) * tl.sum(kept) + (tl.cumsum(by_key, axis=0) - by_key)
    scores = grad_scores.to(query.dtype)
    grad_query += tl.dot(scores, key, input_precision=PRECISION)
    grad_key += tl.dot(tl.trans(scores), query, input_precision=PRECISION)
    return grad_query, grad_key, grad_decay


@thin_launch
@triton.jit(do_not_specialize=["S", "count"])
def _gradients_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    grad_y_ptr,
    decay_ptr,
    weight_ptr,
    skip_ptr,
    table_ptr,
    states_ptr,
    grad_states_ptr,
    scores_ptr,
    grad_scores_ptr,
    kept_ptr,
    grad_query_ptr,
    grad_key_ptr,
    grad_value_ptr,
    grad_decay_ptr,
    grad_factor_ptr,
    grad_skip_ptr,
    S,
    count,
    scale,
    query_stride,
    query_head,
    key_stride,
    key_head,
    value_stride,
    value_head,
    grad_y_stride,
    grad_y_head,
    N: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    QUERY_GROUP: tl.constexpr,
    KEY_GROUP: tl.constexpr,
    VALUE_GROUP: tl.constexpr,
    DECAY: tl.constexpr,
    HAS_FACTOR: tl.constexpr,
    HAS_SKIP: tl.constexpr,
    PACKED: tl.constexpr,
    INCLUSIVE: tl.constexpr,
    PRECISION: tl.constexpr,
    C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    head, slot = tl.program_id(0) % N, (tl.program_id(0) // N).to(tl.int64)
    start, length = slot_of(table_ptr, slot, count, S, C, PACKED)
    query_ptr += (head // QUERY_GROUP).to(tl.int64) * query_head
    key_ptr += (head // KEY_GROUP).to(tl.int64) * key_head
    value_ptr += (head // VALUE_GROUP).to(tl.int64) * value_head
    grad_y_ptr += head.to(tl.int64) * grad_y_head
    query = load_rows(query_ptr, start, length, query_stride, 0, C, K, BLOCK_K)
    key = load_rows(key_ptr, start, length, key_stride, 0, C, K, BLOCK_K)
    weight = 0.0
    if HAS_FACTOR:
        weight = tl.load(weight_ptr + (head.to(tl.int64) * count + slot) * C + tl.arange(0, C))
    until, reached, last, left_over, read, kept_key, passed = _of_keys(
        query, key, decay_ptr, scores_ptr, head, slot, count, scale, N, K, DECAY, INCLUSIVE,
        PRECISION, C, BLOCK_K,
    )  # fmt: skip
    skip = 0.0
    if HAS_SKIP:
        skip = tl.load(skip_ptr + head).to(tl.float32)
    grad_skip, grad_factor = tl.zeros((C,), dtype=tl.float32), tl.zeros((C,), dtype=tl.float32)
    kept = tl.zeros((BLOCK_K,), dtype=tl.float32)
    grad_scores = tl.zeros((C, C), dtype=tl.float32)
    grad_query = tl.zeros((C, BLOCK_K), dtype=tl.float32)
    grad_key = tl.zeros((C, BLOCK_K), dtype=tl.float32)
    for first in range(0, V, BLOCK_V):
        grad_y = load_rows(grad_y_ptr, start, length, grad_y_stride, first, C, V, BLOCK_V)
        value = load_rows(value_ptr, start, length, value_stride, first, C, V, BLOCK_V)
        state = load_state(states_ptr, slot * N + head, 0, first, K, V, BLOCK_K, BLOCK_V)
        grad_state = load_state(grad_states_ptr, slot * N + head, 0, first, K, V, BLOCK_K, BLOCK_V)
        grad_scores += tl.dot(grad_y, tl.trans(value), input_precision=PRECISION)
        grad_query += tl.dot(grad_y, tl.trans(state), input_precision=PRECISION)
        grad_key += tl.dot(value, tl.trans(grad_state), input_precision=PRECISION)
        grad_value = tl.dot(kept_key, grad_state, input_precision=PRECISION)
        if DECAY == 1:
            grad_value *= left_over
        if DECAY != 0:
            kept += tl.sum(state.to(tl.float32) * grad_state.to(tl.float32), axis=1)
        grad_value += tl.dot(passed, grad_y, input_precision=PRECISION)
        if HAS_FACTOR:
            grad_factor += tl.sum(grad_value * value.to(tl.float32), axis=1)
            grad_value *= weight[:, None]
        if HAS_SKIP:
            grad_value += skip * grad_y.to(tl.float32)
            grad_skip += tl.sum(grad_y.to(tl.float32) * value.to(tl.float32), axis=1)
        store_rows(
            grad_value_ptr + head * V, grad_value, start, length, N * V, first, C, V, BLOCK_V
        )
    _store_by_token(grad_factor_ptr, grad_factor, head, start, length, N, C, HAS_FACTOR)
    if HAS_SKIP:
        tl.store(grad_skip_ptr + slot * N + head, tl.sum(grad_skip))
    grad_query *= read
    grad_key *= left_over
    if HAS_FACTOR:
        grad_key *= weight[:, None]
    grad_scores *= scale
    if DECAY == 2:
        grad_scores = weigh_scores(grad_scores, 0.0, 0.0, 0.0, C, 0, False, INCLUSIVE, False)
        store_rows(grad_scores_ptr, grad_scores, (slot * N + head) * C, C, C, 0, C, C, C)
        channel = tl.arange(0, BLOCK_K)
        kept *= tl.exp(load_channels(decay_ptr + (slot * N + head) * (C * K), C - 1, channel, K))
        tl.store(kept_ptr + (slot * N + head) * K + channel, kept, mask=channel < K)
    else:
        grad_query, grad_key, grad_decay = _of_pairs(
            grad_scores, grad_query, grad_key, query, key, kept, until, reached, last, weight,
            DECAY, HAS_FACTOR, INCLUSIVE, PRECISION, C,
        )  # fmt: skip
        _store_by_token(grad_decay_ptr, grad_decay, head, start, length, N, C, DECAY == 1)
    store_rows(grad_query_ptr + head * K, grad_query, start, length, N * K, 0, C, K, BLOCK_K)
    store_rows(grad_key_ptr + head * K, grad_key, start, length, N * K, 0, C, K, BLOCK_K)


def write_gradients(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad_y: Tensor,
    decay: Tensor | None,
    weight: Tensor | None,
    skip: Tensor | None,
    states: Tensor,
    grad_states: Tensor,
    of_scores: tuple[Tensor | None, Tensor | None, Tensor | None],
    grads: tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None],
    scale: float,
    inclusive: bool,
    slots: Slots,
    settings: ChunkSettings,
) -> None:
    """Write the gradients of the inputs, head by head.

    Args:
        query: Shape (B, S, heads, K) or (T, heads, K).
        key: Likewise.
        value: Shape (B, S, heads, V) or (T, heads, V).
        grad_y: Gradient of the outputs, shape (B, S, N, V) or (T, N, V).
        decay: Sums from `sum_decays` or `sum_channel_decays`; `None` for no decay.
        weight: Factors of keys from `sum_decays`; `None` for none.
        skip: Factor of each head's values that is added, shape (N,); `None` for none.
        states: State before each chunk, shape (slots, N, K, V), dtype of `query`.
        grad_states: Gradient of the state after each chunk, likewise.
        of_scores: Where each channel decays by itself, scores from `channel_scores`, and where to
            write what `add_channel_gradients` takes; else `None`.
        grads: Where to write, contiguous: gradients of queries and keys, shape (..., N, K), and of
            values, shape (..., N, V); of decays (a head) and of factors, shape (..., N); and for each slot
            and head its part of the gradient of `skip`, float32, shape (slots, N).
        scale: Factor of what is read.
        inclusive: Whether a token sees itself.
        slots: The chunks.
        settings: How to launch.
    """
    N, K, V = states.shape[1:]
    if states.numel() == 0:
        return
    scores, grad_scores, kept = of_scores
    query, query_stride, query_head = as_tokens(query)
    key, key_stride, key_head = as_tokens(key)
    value, value_stride, value_head = as_tokens(value)
    grad_y, grad_y_stride, grad_y_head = as_tokens(grad_y)
    _gradients_kernel[(slots.count * N,)](
        query,
        key,
        value,
        grad_y,
        decay,
        weight,
        skip,
        slots.table,
        states,
        grad_states,
        scores,
        grad_scores,
        kept,
        *grads,
        slots.S,
        slots.count,
        scale,
        query_stride,
        query_head,
        key_stride,
        key_head,
        value_stride,
        value_head,
        grad_y_stride,
        grad_y_head,
        N=N,
        K=K,
        V=V,
        QUERY_GROUP=N // query.shape[-2],
        KEY_GROUP=N // key.shape[-2],
        VALUE_GROUP=N // value.shape[-2],
        DECAY=kind_of_sums(decay),
        HAS_FACTOR=weight is not None,
        HAS_SKIP=skip is not None,
        PACKED=slots.table is not None,
        INCLUSIVE=inclusive,
        PRECISION=precision_of(query.dtype),
        C=settings.chunk,
        BLOCK_K=settings.block_key,
        BLOCK_V=settings.block_value,
        num_warps=settings.num_warps,
        num_stages=settings.num_stages,
    )
