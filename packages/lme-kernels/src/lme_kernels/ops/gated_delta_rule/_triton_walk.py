"""The walks of the gated delta rule over the chunks of a sequence, forwards and backwards.

A program carries a block of columns of one head's state in float32, which no other program needs.
Rows of queries and keys are multiplied as they are; what normalises them is a factor of sums. Where
rounding would be much of the error of all that follows, a factor is split in two numbers of the
inputs' dtype: what a triangular matrix is multiplied with, and what outputs add to the gradient of
states, which slow decays sum over many chunks.
"""

import triton
import triton.language as tl

from lme_kernels._triton_chunks import load_rows, load_state, sequence_of, store_rows, store_state
from lme_kernels._triton_launch import thin_launch
from lme_kernels.ops.gated_delta_rule._triton_system import power_of_two, vectors_of


@triton.jit
def _split_product(left, right, total, PRECISION: tl.constexpr):
    """Add a product with a float32 tile, taken to twice the digits of the dtype of `left`."""
    high = right.to(left.dtype)
    result = tl.dot(left, high, total, input_precision=PRECISION)
    if left.dtype != tl.float32:
        low = (right - high.to(tl.float32)).to(left.dtype)
        result = tl.dot(left, low, result, input_precision=PRECISION)
    return result


@triton.jit
def _place(N: tl.constexpr, V: tl.constexpr, BLOCK_V: tl.constexpr):
    """First column, head and sequence of this program; those of one sequence run side by side."""
    blocks: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    program = tl.program_id(0)
    return program % blocks * BLOCK_V, program // blocks % N, program // (blocks * N)


@triton.jit
def _square(ptr, index, C: tl.constexpr):
    row = tl.arange(0, C)
    return tl.load(ptr + index * (C * C) + row[:, None] * C + row[None, :])


@thin_launch
@triton.jit(do_not_specialize=["S", "count"])
def forward_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    vectors_ptr,
    inverse_ptr,
    scores_ptr,
    initial_ptr,
    cu_ptr,
    first_ptr,
    y_ptr,
    final_ptr,
    states_ptr,
    written_ptr,
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
    OUTPUT: tl.constexpr,
    KEEP: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
    C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Walk forwards; `OUTPUT` gives the result and last states, `KEEP` what the backward needs."""
    column, head, sequence = _place(N, V, BLOCK_V)
    start, length, base = sequence_of(cu_ptr, first_ptr, sequence, S, C, PACKED)
    query_ptr += (head // QUERY_GROUP).to(tl.int64) * query_head_stride
    key_ptr += (head // KEY_GROUP).to(tl.int64) * key_head_stride
    value_ptr += (head // VALUE_GROUP).to(tl.int64) * value_head_stride
    own = sequence.to(tl.int64) * N + head
    dtype: tl.constexpr = key_ptr.dtype.element_ty
    state = tl.zeros((BLOCK_K, BLOCK_V), dtype=tl.float32)
    if HAS_INITIAL:
        state = load_state(initial_ptr, own, 0, column, K, V, BLOCK_K, BLOCK_V).to(tl.float32)
    for chunk in range(tl.cdiv(length, C)):
        index = (base + chunk) * N + head
        token, left = start + chunk * C, length - chunk * C
        until, key_norm, query_norm, strength, last = vectors_of(vectors_ptr, index, C)
        key = load_rows(key_ptr, token, left, key_stride, 0, C, K, BLOCK_K)
        value = load_rows(value_ptr, token, left, value_stride, column, C, V, BLOCK_V)
        inverse = _square(inverse_ptr, index, C)
        rounded = state.to(dtype)
        known = tl.dot(key, rounded, input_precision=PRECISION)
        decay = power_of_two(until, PRECISION)
        error = value.to(tl.float32) - known * (decay * key_norm)[:, None]
        empty = tl.zeros((C, BLOCK_V), dtype=tl.float32)
        written = _split_product(inverse, error * strength[:, None], empty, PRECISION)
        if KEEP:
            store_state(states_ptr, rounded, index, 0, column, K, V, BLOCK_K, BLOCK_V)
            high = written.to(dtype)
            store_rows(written_ptr, high, index * C, C, V, column, C, V, BLOCK_V)
            if dtype != tl.float32:
                low = written - high.to(tl.float32)
                rest = (index + count.to(tl.int64) * N) * C
                store_rows(written_ptr, low, rest, C, V, column, C, V, BLOCK_V)
        if OUTPUT:
            query = load_rows(query_ptr, token, left, query_stride, 0, C, K, BLOCK_K)
            scores = _square(scores_ptr, index, C)
            y = tl.dot(query, rounded, input_precision=PRECISION)
            y *= (decay * query_norm * scale)[:, None]
            y = tl.dot(scores, written.to(dtype), y, input_precision=PRECISION)
            store_rows(y_ptr + head * V, y, token, left, N * V, column, C, V, BLOCK_V)
        written *= (power_of_two(last - until, PRECISION) * key_norm)[:, None]
        state = tl.dot(
            tl.trans(key),
            written.to(dtype),
            state * power_of_two(last, PRECISION),
            input_precision=PRECISION,
        )
    if OUTPUT:
        store_state(final_ptr, state, own, 0, column, K, V, BLOCK_K, BLOCK_V)


@thin_launch
@triton.jit(do_not_specialize=["S"])
def backward_kernel(
    query_ptr,
    key_ptr,
    grad_y_ptr,
    vectors_ptr,
    inverse_ptr,
    scores_ptr,
    grad_final_ptr,
    cu_ptr,
    first_ptr,
    grad_states_ptr,
    grad_scaled_ptr,
    grad_value_ptr,
    grad_initial_ptr,
    S,
    scale,
    query_stride,
    query_head_stride,
    key_stride,
    key_head_stride,
    N: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    QUERY_GROUP: tl.constexpr,
    KEY_GROUP: tl.constexpr,
    HAS_GRAD_FINAL: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
    C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Walk backwards: gradients of states, values, and of `diag(beta) X` as `grad_scaled`."""
    column, head, sequence = _place(N, V, BLOCK_V)
    start, length, base = sequence_of(cu_ptr, first_ptr, sequence, S, C, PACKED)
    query_ptr += (head // QUERY_GROUP).to(tl.int64) * query_head_stride
    key_ptr += (head // KEY_GROUP).to(tl.int64) * key_head_stride
    own = sequence.to(tl.int64) * N + head
    dtype: tl.constexpr = key_ptr.dtype.element_ty
    grad = tl.zeros((BLOCK_K, BLOCK_V), dtype=tl.float32)
    if HAS_GRAD_FINAL:
        grad = load_state(grad_final_ptr, own, 0, column, K, V, BLOCK_K, BLOCK_V).to(tl.float32)
    chunks = tl.cdiv(length, C)
    for step in range(chunks):
        chunk = chunks - 1 - step
        index = (base + chunk) * N + head
        token, left = start + chunk * C, length - chunk * C
        until, key_norm, query_norm, strength, last = vectors_of(vectors_ptr, index, C)
        key = load_rows(key_ptr, token, left, key_stride, 0, C, K, BLOCK_K)
        query = load_rows(query_ptr, token, left, query_stride, 0, C, K, BLOCK_K)
        grad_y = load_rows(grad_y_ptr + head * V, token, left, N * V, column, C, V, BLOCK_V)
        inverse = _square(inverse_ptr, index, C)
        scores = _square(scores_ptr, index, C)
        rounded = grad.to(dtype)
        store_state(grad_states_ptr, rounded, index, 0, column, K, V, BLOCK_K, BLOCK_V)
        written = tl.dot(key, rounded, input_precision=PRECISION)
        written *= (power_of_two(last - until, PRECISION) * key_norm)[:, None]
        written = tl.dot(tl.trans(scores), grad_y, written, input_precision=PRECISION)
        empty = tl.zeros((C, BLOCK_V), dtype=tl.float32)
        scaled = _split_product(tl.trans(inverse), written, empty, PRECISION)
        store_rows(grad_scaled_ptr, scaled, index * C, C, V, column, C, V, BLOCK_V)
        scaled *= strength[:, None]
        store_rows(grad_value_ptr + head * V, scaled, token, left, N * V, column, C, V, BLOCK_V)
        decay = power_of_two(until, PRECISION)
        read = grad_y.to(tl.float32) * (decay * query_norm * scale)[:, None]
        known = scaled * -(decay * key_norm)[:, None]
        grad = _split_product(
            tl.trans(query), read, grad * power_of_two(last, PRECISION), PRECISION
        )
        grad = tl.dot(tl.trans(key), known.to(dtype), grad, input_precision=PRECISION)
    if HAS_INITIAL:
        store_state(grad_initial_ptr, grad, own, 0, column, K, V, BLOCK_K, BLOCK_V)
