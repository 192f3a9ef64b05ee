"""Outputs in Triton: of each chunk by itself from the state before it, or walking the sequence."""

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
    sequence_of,
    slot_of,
    store_rows,
    store_state,
)
from lme_kernels._triton_launch import thin_launch
from lme_kernels.ops.linear_attention._triton_states import (
    exp_of,
    head_decay,
    kind_of_sums,
    load_channels,
)
from lme_kernels.ops.linear_attention.settings import ChunkSettings
from lme_kernels.tuning import ceil_div


@triton.jit
def weigh_scores(
    scores,
    until,
    reached,
    weight,
    C: tl.constexpr,
    DECAY: tl.constexpr,
    HAS_FACTOR: tl.constexpr,
    INCLUSIVE: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """Multiply scores of a chunk with what is left of each key when a token reads it.

    Rows are of tokens and columns of keys, unless `TRANSPOSED`.
    """
    row, column = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    if TRANSPOSED:
        seen = row <= column if INCLUSIVE else row < column
        if DECAY == 1:
            scores *= exp_of(tl.where(seen, reached[None, :] - until[:, None], 0.0))
        if HAS_FACTOR:
            scores *= weight[:, None]
    else:
        seen = row >= column if INCLUSIVE else row > column
        if DECAY == 1:
            scores *= exp_of(tl.where(seen, reached[:, None] - until[None, :], 0.0))
        if HAS_FACTOR:
            scores *= weight[None, :]
    return tl.where(seen, scores, 0.0)


@triton.jit
def _finish(y, value, skip_ptr, head, scale, HAS_SKIP: tl.constexpr):
    y *= scale
    if HAS_SKIP:
        y += tl.load(skip_ptr + head).to(tl.float32) * value.to(tl.float32)
    return y


@thin_launch
@triton.jit(do_not_specialize=["S", "count"])
def _outputs_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    decay_ptr,
    weight_ptr,
    skip_ptr,
    table_ptr,
    states_ptr,
    scores_ptr,
    y_ptr,
    S,
    count,
    scale,
    query_stride,
    query_head,
    key_stride,
    key_head,
    value_stride,
    value_head,
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
    blocks: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    program = tl.program_id(0)
    first = (program % blocks) * BLOCK_V
    program = program // blocks
    head, slot = program % N, (program // N).to(tl.int64)
    start, length = slot_of(table_ptr, slot, count, S, C, PACKED)
    query_ptr += (head // QUERY_GROUP).to(tl.int64) * query_head
    key_ptr += (head // KEY_GROUP).to(tl.int64) * key_head
    value_ptr += (head // VALUE_GROUP).to(tl.int64) * value_head
    query = load_rows(query_ptr, start, length, query_stride, 0, C, K, BLOCK_K)
    state = load_state(states_ptr, slot * N + head, 0, first, K, V, BLOCK_K, BLOCK_V)
    value = load_rows(value_ptr, start, length, value_stride, first, C, V, BLOCK_V)
    if DECAY == 2:
        # The scores are there, times `scale`.
        row, channel = tl.arange(0, C)[:, None], tl.arange(0, BLOCK_K)[None, :]
        own = decay_ptr + (slot * N + head) * (C * K)
        reached = load_channels(own, row if INCLUSIVE else row - 1, channel, K)
        query = (query.to(tl.float32) * (tl.exp(reached) * scale)).to(query.dtype)
        scores = load_rows(scores_ptr, (slot * N + head) * C, C, C, 0, C, C, C)
        y = tl.dot(query, state, input_precision=PRECISION)
        scale = 1.0
    else:
        key = load_columns(key_ptr, start, length, key_stride, 0, C, K, BLOCK_K)
        y = tl.dot(query, state, input_precision=PRECISION)
        scores = tl.dot(query, key, input_precision=PRECISION)
        until, reached, weight = 0.0, 0.0, 0.0
        if DECAY == 1:
            until, reached, _ = head_decay(decay_ptr, head, slot, count, C, INCLUSIVE)
            y *= exp_of(reached)[:, None]
        if HAS_FACTOR:
            weight = tl.load(weight_ptr + (head.to(tl.int64) * count + slot) * C + tl.arange(0, C))
        scores = weigh_scores(
            scores, until, reached, weight, C, DECAY, HAS_FACTOR, INCLUSIVE, False
        ).to(value.dtype)
    y += tl.dot(scores, value, input_precision=PRECISION)
    y = _finish(y, value, skip_ptr, head, scale, HAS_SKIP)
    store_rows(y_ptr + head * V, y, start, length, N * V, first, C, V, BLOCK_V)


@thin_launch
@triton.jit(do_not_specialize=["S", "count"])
def _walk_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    decay_ptr,
    weight_ptr,
    skip_ptr,
    initial_ptr,
    cu_ptr,
    first_ptr,
    y_ptr,
    final_ptr,
    S,
    count,
    scale,
    query_stride,
    query_head,
    key_stride,
    key_head,
    value_stride,
    value_head,
    N: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    QUERY_GROUP: tl.constexpr,
    KEY_GROUP: tl.constexpr,
    VALUE_GROUP: tl.constexpr,
    DECAY: tl.constexpr,
    HAS_FACTOR: tl.constexpr,
    HAS_SKIP: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    PACKED: tl.constexpr,
    INCLUSIVE: tl.constexpr,
    PRECISION: tl.constexpr,
    C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    blocks: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    program = tl.program_id(0)
    first = (program % blocks) * BLOCK_V
    program = program // blocks
    head, sequence = program % N, program // N
    start, length, base = sequence_of(cu_ptr, first_ptr, sequence, S, C, PACKED)
    query_ptr += (head // QUERY_GROUP).to(tl.int64) * query_head
    key_ptr += (head // KEY_GROUP).to(tl.int64) * key_head
    value_ptr += (head // VALUE_GROUP).to(tl.int64) * value_head
    y_ptr += head * V
    state = tl.zeros((BLOCK_K, BLOCK_V), dtype=tl.float32)
    if HAS_INITIAL:
        state = load_state(initial_ptr, program, 0, first, K, V, BLOCK_K, BLOCK_V).to(tl.float32)
    for place in range(tl.cdiv(length, C)):
        token, left = start + place * C, length - place * C
        query = load_rows(query_ptr, token, left, query_stride, 0, C, K, BLOCK_K)
        key = load_columns(key_ptr, token, left, key_stride, 0, C, K, BLOCK_K)
        value = load_rows(value_ptr, token, left, value_stride, first, C, V, BLOCK_V)
        scores = tl.dot(query, key, input_precision=PRECISION)
        y = tl.dot(query, state.to(query.dtype), input_precision=PRECISION)
        until, reached, weight = 0.0, 0.0, 0.0
        kept = key
        if HAS_FACTOR:
            own = weight_ptr + (head.to(tl.int64) * count + base + place) * C
            weight = tl.load(own + tl.arange(0, C))
        if DECAY == 1:
            until, reached, last = head_decay(decay_ptr, head, base + place, count, C, INCLUSIVE)
            y *= exp_of(reached)[:, None]
            state *= exp_of(last)
            left_over = exp_of(last - until)
            if HAS_FACTOR:
                left_over *= weight
            kept = (key.to(tl.float32) * left_over[None, :]).to(value.dtype)
        elif HAS_FACTOR:
            kept = (key.to(tl.float32) * weight[None, :]).to(value.dtype)
        scores = weigh_scores(
            scores, until, reached, weight, C, DECAY, HAS_FACTOR, INCLUSIVE, False
        ).to(value.dtype)
        # The product that `y` waits for comes last: values that a skip reads too have one buffer,
        # into which the next ones would be loaded while the tensor cores still read these.
        state += tl.dot(kept, value, input_precision=PRECISION)
        y += tl.dot(scores, value, input_precision=PRECISION)
        y = _finish(y, value, skip_ptr, head, scale, HAS_SKIP)
        store_rows(y_ptr, y, token, left, N * V, first, C, V, BLOCK_V)
    store_state(final_ptr, state, program, 0, first, K, V, BLOCK_K, BLOCK_V)


def _strided(query, key, value):
    """The inputs with their strides between tokens and heads, as the kernels take them."""
    query, query_stride, query_head = as_tokens(query)
    key, key_stride, key_head = as_tokens(key)
    value, value_stride, value_head = as_tokens(value)
    strides = (query_stride, query_head, key_stride, key_head, value_stride, value_head)
    return query, key, value, strides


def write_outputs(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    decay: Tensor | None,
    weight: Tensor | None,
    skip: Tensor | None,
    states: Tensor,
    scores: Tensor | None,
    y: Tensor,
    scale: float,
    inclusive: bool,
    slots: Slots,
    settings: ChunkSettings,
) -> None:
    """Write `y`, shape (B, S, N, V) or (T, N, V), from the states before each chunk.

    Args:
        query: Shape (B, S, heads, K) or (T, heads, K).
        key: Likewise.
        value: Shape (B, S, heads, V) or (T, heads, V).
        decay: Sums from `sum_decays` or `sum_channel_decays`; `None` for no decay.
        weight: Factors of keys from `sum_decays`; `None` for none.
        skip: Factor of each head's values that is added, shape (N,); `None` for none.
        states: Shape (slots, N, K, V), dtype of `query`.
        scores: What each token takes of each key of its chunk, from `channel_scores`, where each
            channel decays by itself; else `None`.
        y: Where to write.
        scale: Factor of what is read.
        inclusive: Whether a token sees itself.
        slots: The chunks.
        settings: How to launch.
    """
    N, K, V = states.shape[1:]
    if y.numel() == 0:
        return
    query, key, value, strides = _strided(query, key, value)
    _outputs_kernel[(slots.count * N * ceil_div(V, settings.block_value),)](
        query,
        key,
        value,
        decay,
        weight,
        skip,
        slots.table,
        states,
        scores,
        y,
        slots.S,
        slots.count,
        scale,
        *strides,
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


def walk_outputs(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    decay: Tensor | None,
    weight: Tensor | None,
    skip: Tensor | None,
    initial: Tensor | None,
    y: Tensor,
    final: Tensor,
    scale: float,
    inclusive: bool,
    slots: Slots,
    settings: ChunkSettings,
) -> None:
    """Write `y` and the final states without storing any other.

    Args:
        query: As in `write_outputs`, like all that is not listed.
        key: Likewise.
        value: Likewise.
        decay: Likewise.
        weight: Likewise.
        skip: Likewise.
        initial: State before each sequence, shape (sequences, N, K, V); `None` for zeros.
        y: Where to write.
        final: Gets the state after each sequence, shape of `initial`.
        scale: Factor of what is read.
        inclusive: Whether a token sees itself.
        slots: The chunks.
        settings: How to launch.
    """
    sequences, N, K, V = final.shape
    if final.numel() == 0:
        return
    query, key, value, strides = _strided(query, key, value)
    _walk_kernel[(sequences * N * ceil_div(V, settings.block_value),)](
        query,
        key,
        value,
        decay,
        weight,
        skip,
        None if initial is None else initial.contiguous(),
        slots.cu_seqlens,
        slots.first,
        y,
        final,
        slots.S,
        slots.count,
        scale,
        *strides,
        N=N,
        K=K,
        V=V,
        QUERY_GROUP=N // query.shape[-2],
        KEY_GROUP=N // key.shape[-2],
        VALUE_GROUP=N // value.shape[-2],
        DECAY=kind_of_sums(decay),
        HAS_FACTOR=weight is not None,
        HAS_SKIP=skip is not None,
        HAS_INITIAL=initial is not None,
        PACKED=slots.first is not None,
        INCLUSIVE=inclusive,
        PRECISION=precision_of(query.dtype),
        C=settings.chunk,
        BLOCK_K=settings.block_key,
        BLOCK_V=settings.block_value,
        num_warps=settings.num_warps,
        num_stages=settings.num_stages,
    )
