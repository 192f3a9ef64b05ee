"""Gradients of the inputs of the gated delta rule in Triton, all chunks at once.

In float32, what a token's decay stands between is summed as such, pair by pair: in the difference of
what later and earlier tokens take part in, all pairs on one side of it cancel, which leaves less than
float32's digits. What tokens wrote comes as two numbers of the inputs'
dtype, since its rounding would be the largest error of these gradients.
"""

import triton
import triton.language as tl

from lme_kernels._triton_chunks import load_rows, load_state, slot_of, store_rows
from lme_kernels._triton_launch import thin_launch
from lme_kernels.ops.gated_delta_rule._triton_system import (
    decays_between,
    power_of_two,
    vectors_of,
)


@triton.jit
def _of_pairs(pairs, PRECISION: tl.constexpr, C: tl.constexpr):
    """What each decay gains from pairs of a token (down) and an earlier one (across).

    Two vectors: one to be summed over the tokens at and after each, and one as it is.
    """
    gain = tl.zeros((C,), dtype=tl.float32)
    if PRECISION == "ieee":
        row = tl.arange(0, C)
        before = (row[:, None] < row[None, :]).to(tl.float32)
        sums = tl.dot(pairs, before, input_precision="ieee")
        whole = tl.sum(tl.where(row[:, None] >= row[None, :], sums, 0.0), axis=0)
    else:
        whole = gain
        gain = tl.sum(pairs, axis=1) - tl.sum(pairs, axis=0)
    return gain, whole


@thin_launch
@triton.jit(do_not_specialize=["S", "count"])
def inputs_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    grad_y_ptr,
    table_ptr,
    vectors_ptr,
    states_ptr,
    written_ptr,
    grad_states_ptr,
    grad_scaled_ptr,
    grad_query_ptr,
    grad_key_ptr,
    grad_decay_ptr,
    grad_beta_ptr,
    S,
    count,
    scale,
    query_stride,
    query_head_stride,
    key_stride,
    key_head_stride,
    value_stride,
    value_head_stride,
    N: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    QUERY_GROUP: tl.constexpr,
    KEY_GROUP: tl.constexpr,
    VALUE_GROUP: tl.constexpr,
    NORMALIZE: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
    C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    head, slot = tl.program_id(0) % N, (tl.program_id(0) // N).to(tl.int64)
    start, length = slot_of(table_ptr, slot, count, S, C, PACKED)
    if length <= 0:
        return
    query_ptr += (head // QUERY_GROUP).to(tl.int64) * query_head_stride
    key_ptr += (head // KEY_GROUP).to(tl.int64) * key_head_stride
    value_ptr += (head // VALUE_GROUP).to(tl.int64) * value_head_stride
    dtype: tl.constexpr = key_ptr.dtype.element_ty
    index = slot * N + head
    low_index = index + count.to(tl.int64) * N
    until, key_norm, query_norm, strength, last = vectors_of(vectors_ptr, index, C)
    decay = power_of_two(until, PRECISION)
    # Gradients here are of queries and keys as factors of the normalised ones. No product is added
    # to in the same iteration as another: the compiler would give all warps the same rows.
    # And no tile is read by a product and by anything else in one loop: the compiler keeps one buffer
    # of it, and would load the next tile into it while the tensor cores still read this one.
    scores = tl.zeros((C, C), dtype=tl.float32)
    system = tl.zeros((C, C), dtype=tl.float32)
    low_scores = tl.zeros((C, C), dtype=tl.float32)
    low_system = tl.zeros((C, C), dtype=tl.float32)
    of_values = tl.zeros((C, BLOCK_V), dtype=tl.float32)
    for first in range(0, V, BLOCK_V):
        grad_y = load_rows(grad_y_ptr + head * V, start, length, N * V, first, C, V, BLOCK_V)
        grad_scaled = load_rows(grad_scaled_ptr, index * C, C, V, first, C, V, BLOCK_V)
        written = load_rows(written_ptr, index * C, C, V, first, C, V, BLOCK_V)
        scores = tl.dot(grad_y, tl.trans(written), scores, input_precision=PRECISION)
        system = tl.dot(grad_scaled, tl.trans(written), system, input_precision=PRECISION)
        if dtype != tl.float32:
            low = load_rows(written_ptr, low_index * C, C, V, first, C, V, BLOCK_V)
            low_scores = tl.dot(grad_y, tl.trans(low), low_scores)
            low_system = tl.dot(grad_scaled, tl.trans(low), low_system)
    for first in tl.range(0, V, BLOCK_V, num_stages=1):
        grad_scaled = load_rows(grad_scaled_ptr, index * C, C, V, first, C, V, BLOCK_V)
        value = load_rows(value_ptr, start, length, value_stride, first, C, V, BLOCK_V)
        of_values += grad_scaled.to(tl.float32) * value.to(tl.float32)
    of_beta = tl.sum(of_values, axis=1)
    key = load_rows(key_ptr, start, length, key_stride, 0, C, K, BLOCK_K)
    query = load_rows(query_ptr, start, length, query_stride, 0, C, K, BLOCK_K)
    scores += low_scores
    scores *= decays_between(until, False, C, PRECISION) * query_norm[:, None] * key_norm[None, :]
    pairs = tl.dot(query, tl.trans(key), input_precision=PRECISION) * (scores * scale)
    crossing = pairs
    rounded_scores = scores.to(dtype)
    system += low_system
    system *= decays_between(until, True, C, PRECISION) * -key_norm[:, None] * key_norm[None, :]
    pairs = tl.dot(key, tl.trans(key), input_precision=PRECISION) * system
    of_beta += tl.sum(pairs, axis=1)
    crossing += pairs * strength[:, None]
    gain, of_pairs = _of_pairs(crossing, PRECISION, C)
    system *= strength[:, None]
    rounded_system = (system + tl.trans(system)).to(dtype)

    of_query = tl.zeros((C, BLOCK_K), dtype=tl.float32)
    for first in range(0, V, BLOCK_V):
        grad_y = load_rows(grad_y_ptr + head * V, start, length, N * V, first, C, V, BLOCK_V)
        state = load_state(states_ptr, index, 0, first, K, V, BLOCK_K, BLOCK_V)
        of_query = tl.dot(grad_y, tl.trans(state), of_query, input_precision=PRECISION)
    of_query *= (decay * query_norm)[:, None]
    gain += tl.sum(query.to(tl.float32) * of_query, axis=1) * scale
    of_query += tl.dot(rounded_scores, key, input_precision=PRECISION)
    if NORMALIZE:
        wide = query.to(tl.float32)
        of_query -= wide * (query_norm * query_norm * tl.sum(wide * of_query, axis=1))[:, None]
    of_query *= scale
    store_rows(grad_query_ptr + head * K, of_query, start, length, N * K, 0, C, K, BLOCK_K)

    erasing = tl.zeros((C, BLOCK_K), dtype=tl.float32)
    kept = tl.zeros((BLOCK_K, BLOCK_V), dtype=tl.float32)
    for first in range(0, V, BLOCK_V):
        grad_scaled = load_rows(grad_scaled_ptr, index * C, C, V, first, C, V, BLOCK_V)
        state = load_state(states_ptr, index, 0, first, K, V, BLOCK_K, BLOCK_V)
        erasing = tl.dot(grad_scaled, tl.trans(state), erasing, input_precision=PRECISION)
    for first in tl.range(0, V, BLOCK_V, num_stages=1):
        state = load_state(states_ptr, index, 0, first, K, V, BLOCK_K, BLOCK_V)
        grad_state = load_state(grad_states_ptr, index, 0, first, K, V, BLOCK_K, BLOCK_V)
        kept += state.to(tl.float32) * grad_state.to(tl.float32)
    of_last = power_of_two(last, PRECISION) * tl.sum(tl.sum(kept, axis=1), axis=0)
    erasing *= -(decay * key_norm)[:, None]
    # Loaded again, which leaves registers free in between.
    key = load_rows(key_ptr, start, length, key_stride, 0, C, K, BLOCK_K)
    erased = tl.sum(key.to(tl.float32) * erasing, axis=1)
    gain += erased * strength
    of_beta += erased
    erasing *= strength[:, None]

    of_key = tl.zeros((C, BLOCK_K), dtype=tl.float32)
    low_key = tl.zeros((C, BLOCK_K), dtype=tl.float32)
    for first in range(0, V, BLOCK_V):
        written = load_rows(written_ptr, index * C, C, V, first, C, V, BLOCK_V)
        grad_state = load_state(grad_states_ptr, index, 0, first, K, V, BLOCK_K, BLOCK_V)
        of_key = tl.dot(written, tl.trans(grad_state), of_key, input_precision=PRECISION)
        if dtype != tl.float32:
            low = load_rows(written_ptr, low_index * C, C, V, first, C, V, BLOCK_V)
            low_key = tl.dot(low, tl.trans(grad_state), low_key)
    of_key += low_key
    of_key *= (power_of_two(last - until, PRECISION) * key_norm)[:, None]
    # What a decay gains from tokens before it.
    left = tl.sum(key.to(tl.float32) * of_key, axis=1)
    of_key += erasing
    query = load_rows(query_ptr, start, length, query_stride, 0, C, K, BLOCK_K)
    of_key += tl.dot(rounded_system, key, input_precision=PRECISION)
    of_key += tl.dot(tl.trans(rounded_scores), query, input_precision=PRECISION) * scale
    if NORMALIZE:
        wide = key.to(tl.float32)
        of_key -= wide * (key_norm * key_norm * tl.sum(wide * of_key, axis=1))[:, None]
    store_rows(grad_key_ptr + head * K, of_key, start, length, N * K, 0, C, K, BLOCK_K)

    row = tl.arange(0, C)
    of_decay = tl.cumsum(gain, 0, reverse=True) + tl.cumsum(left, 0) - left + of_last
    of_decay += of_pairs
    own = (start + row) * N + head
    tl.store(grad_decay_ptr + own, of_decay, mask=row < length)
    tl.store(grad_beta_ptr + own, of_beta, mask=row < length)
