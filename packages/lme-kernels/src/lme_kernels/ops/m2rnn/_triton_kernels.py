"""Kernels of the recurrence of matrices: a program walks one head of one sequence.

Rows of the state are apart from each other but for sums, so that where warps share its rows the
state never leaves their registers. The forward keeps it every `EVERY` tokens; the backward walks
each such stretch once more, puts the states into a scratch of its own, and walks it back.
"""

import triton
import triton.language as tl

from lme_kernels._triton_launch import thin_launch
from lme_kernels.ops.rnn._triton_scan import bounds_of, load_steps, tanh


@triton.jit
def _times(left, right, dtype: tl.constexpr):
    """Product of a float32 and another matrix, the second rounded to `dtype`, summed in float32."""
    high = left.to(dtype)
    result = tl.dot(high, right.to(dtype), input_precision="ieee")
    if dtype != tl.float32:
        # What rounding took off: sizes are so small that a second product costs little.
        result = tl.dot((left - high.to(tl.float32)).to(dtype), right.to(dtype), acc=result)
    return result


@triton.jit
def _load_weight(ptr, index, V: tl.constexpr, BLOCK_V: tl.constexpr):
    row, column = tl.arange(0, BLOCK_V)[:, None], tl.arange(0, BLOCK_V)[None, :]
    offset = index.to(tl.int64) * V * V + row * V + column
    return tl.load(ptr + offset, mask=(row < V) & (column < V), other=0.0)


@triton.jit
def _bounds(cu_ptr, sequence, sequences, S, PACKED: tl.constexpr):
    """As `bounds_of`, of one sequence, as scalars."""
    start, length = bounds_of(cu_ptr, sequence + tl.zeros((1,), tl.int64), sequences, S, PACKED)
    return tl.max(start, axis=0), tl.max(length, axis=0)


@thin_launch
@triton.jit(do_not_specialize=["S", "sequences"])
def forward_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    weight_ptr,
    forget_ptr,
    initial_ptr,
    cu_ptr,
    y_ptr,
    kept_ptr,
    final_ptr,
    S,
    sequences,
    query_token,
    query_head,
    key_token,
    key_head,
    value_token,
    value_head,
    forget_token,
    forget_head,
    N: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    QUERY_GROUP: tl.constexpr,
    KEY_GROUP: tl.constexpr,
    VALUE_GROUP: tl.constexpr,
    WEIGHT_GROUP: tl.constexpr,
    FORGET_GROUP: tl.constexpr,
    EVERY: tl.constexpr,
    SAVE: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    PACKED: tl.constexpr,
    EXACT: tl.constexpr,
    AHEAD: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    head = tl.program_id(1)
    sequence = tl.program_id(0).to(tl.int64)
    start, length = _bounds(cu_ptr, sequence, sequences, S, PACKED)
    row, column = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
    tile = row[:, None] * V + column[None, :]
    inside = (row < K)[:, None] & (column < V)[None, :]
    weight = _load_weight(weight_ptr, head // WEIGHT_GROUP, V, BLOCK_V)
    own = (sequence * N + head) * (K * V)
    state = tl.zeros((BLOCK_K, BLOCK_V), dtype=tl.float32)
    if HAS_INITIAL:
        state = tl.load(initial_ptr + own + tile, mask=inside, other=0.0).to(tl.float32)
    query_ptrs = query_ptr + start * query_token + (head // QUERY_GROUP) * query_head
    key_ptrs = key_ptr + start * key_token + (head // KEY_GROUP) * key_head
    value_ptrs = value_ptr + start * value_token + (head // VALUE_GROUP) * value_head
    forget_ptrs = forget_ptr + start * forget_token + (head // FORGET_GROUP) * forget_head
    kept = kept_ptr + ((start // EVERY + sequence) * N + head) * (K * V)
    # Of one element: the interpreter cannot combine a scalar condition with a mask.
    zero = tl.zeros((1,), dtype=tl.int32)
    queries = load_steps(query_ptrs, row, row < K, zero, length, query_token, AHEAD)
    keys = load_steps(key_ptrs, row, row < K, zero, length, key_token, AHEAD)
    values = load_steps(value_ptrs, column, column < V, zero, length, value_token, AHEAD)
    forgets = load_steps(forget_ptrs, zero, zero == 0, zero, length, forget_token, AHEAD)
    for t in range(0, length, AHEAD):
        queries_here, keys_here, values_here, forgets_here = queries, keys, values, forgets
        following = zero + t + AHEAD
        queries = load_steps(query_ptrs, row, row < K, following, length, query_token, AHEAD)
        keys = load_steps(key_ptrs, row, row < K, following, length, key_token, AHEAD)
        values = load_steps(value_ptrs, column, column < V, following, length, value_token, AHEAD)
        forgets = load_steps(forget_ptrs, zero, zero == 0, following, length, forget_token, AHEAD)
        now = tl.program_id(0) * 0 + t
        if SAVE and now % EVERY == 0:
            place = (now // EVERY).to(tl.int64) * (N * K * V)
            tl.store(kept + place + tile, state, mask=inside)
        for u in tl.static_range(AHEAD):
            step = zero + t + u
            key = keys_here[u].to(tl.float32)
            value = values_here[u].to(tl.float32)
            forget = forgets_here[u].to(tl.float32)[:, None]
            total = _times(state, weight, weight.dtype) + key[:, None] * value[None, :]
            update = tanh(total, EXACT)
            after = update + forget * (state - update)
            state = tl.where((step < length)[:, None], after, state)
            y = tl.sum(queries_here[u].to(tl.float32)[:, None] * state, axis=0)
            offset = ((start + step) * N + head) * V
            tl.store(y_ptr + offset + column, y, mask=(column < V) & (step < length))
    tl.store(final_ptr + own + tile, state, mask=inside)


@thin_launch
@triton.jit(do_not_specialize=["S", "sequences"])
def backward_kernel(
    grad_y_ptr,
    grad_final_ptr,
    query_ptr,
    key_ptr,
    value_ptr,
    weight_ptr,
    transposed_ptr,
    forget_ptr,
    kept_ptr,
    scratch_ptr,
    cu_ptr,
    grad_query_ptr,
    grad_key_ptr,
    grad_value_ptr,
    grad_weight_ptr,
    grad_forget_ptr,
    grad_initial_ptr,
    S,
    sequences,
    clip,
    query_token,
    query_head,
    key_token,
    key_head,
    value_token,
    value_head,
    forget_token,
    forget_head,
    N: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    QUERY_GROUP: tl.constexpr,
    KEY_GROUP: tl.constexpr,
    VALUE_GROUP: tl.constexpr,
    WEIGHT_GROUP: tl.constexpr,
    FORGET_GROUP: tl.constexpr,
    EVERY: tl.constexpr,
    CLIP: tl.constexpr,
    HAS_GRAD_Y: tl.constexpr,
    HAS_GRAD_FINAL: tl.constexpr,
    PACKED: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row, column = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
    rows, columns = row < K, column < V
    tile = row[:, None] * V + column[None, :]
    inside = rows[:, None] & columns[None, :]
    square = column[:, None] * V + column[None, :]
    zero = tl.program_id(0) * 0
    # A scratch of this program alone: tiles are whole, so that each thread reads what it wrote.
    scratch = scratch_ptr + tl.program_id(0).to(tl.int64) * (EVERY * BLOCK_K * BLOCK_V)
    scratch += row[:, None] * BLOCK_V + column[None, :]
    # Few programs walk many sequences in turn, so that the scratch stays small.
    for turn in range(tl.program_id(0), sequences * N, tl.num_programs(0)):
        task = zero + turn
        head, sequence = task % N, (task // N).to(tl.int64)
        start, length = _bounds(cu_ptr, sequence, sequences, S, PACKED)
        weight = _load_weight(weight_ptr, head // WEIGHT_GROUP, V, BLOCK_V)
        across = _load_weight(transposed_ptr, head // WEIGHT_GROUP, V, BLOCK_V)
        own = (sequence * N + head) * (K * V)
        grad = tl.zeros((BLOCK_K, BLOCK_V), dtype=tl.float32)
        if HAS_GRAD_FINAL:
            grad = tl.load(grad_final_ptr + own + tile, mask=inside, other=0.0).to(tl.float32)
        grad_weight = tl.zeros((BLOCK_V, BLOCK_V), dtype=tl.float32)
        query_base = query_ptr + start * query_token + (head // QUERY_GROUP) * query_head + row
        key_base = key_ptr + start * key_token + (head // KEY_GROUP) * key_head + row
        value_base = value_ptr + start * value_token + (head // VALUE_GROUP) * value_head + column
        forget_base = forget_ptr + start * forget_token + (head // FORGET_GROUP) * forget_head
        kept = kept_ptr + ((start // EVERY + sequence) * N + head) * (K * V)
        stretches = (length + EVERY - 1) // EVERY
        for back in range(stretches):
            stretch = stretches - 1 - (zero + back)
            first = stretch * EVERY
            count = tl.minimum(EVERY, length - first)
            place = stretch.to(tl.int64) * (N * K * V)
            state = tl.load(kept + place + tile, mask=inside, other=0.0)
            for i in range(count):
                step = (first + i).to(tl.int64)
                tl.store(scratch + (zero + i).to(tl.int64) * (BLOCK_K * BLOCK_V), state)
                key = tl.load(key_base + step * key_token, mask=rows, other=0.0)
                value = tl.load(value_base + step * value_token, mask=columns, other=0.0)
                forget = tl.load(forget_base + step * forget_token).to(tl.float32)
                total = _times(state, weight, weight.dtype)
                total += key.to(tl.float32)[:, None] * value.to(tl.float32)[None, :]
                update = tanh(total, EXACT)
                state = update + forget * (state - update)
            tl.debug_barrier()
            for i in range(count):
                index = count - 1 - (zero + i)
                step = (first + index).to(tl.int64)
                before = tl.load(scratch + index.to(tl.int64) * (BLOCK_K * BLOCK_V))
                query = tl.load(query_base + step * query_token, mask=rows, other=0.0)
                key = tl.load(key_base + step * key_token, mask=rows, other=0.0)
                value = tl.load(value_base + step * value_token, mask=columns, other=0.0)
                forget = tl.load(forget_base + step * forget_token).to(tl.float32)
                query, key, value = (
                    query.to(tl.float32),
                    key.to(tl.float32),
                    value.to(tl.float32),
                )
                total = _times(before, weight, weight.dtype) + key[:, None] * value[None, :]
                update = tanh(total, EXACT)
                token = (start + step) * N + head
                if HAS_GRAD_Y:
                    grad_y = tl.load(grad_y_ptr + token * V + column, mask=columns, other=0.0)
                    grad_y = grad_y.to(tl.float32)
                    after = update + forget * (before - update)
                    grad_query = tl.sum(after * grad_y[None, :], axis=1)
                    tl.store(grad_query_ptr + token * K + row, grad_query, mask=rows)
                    grad += query[:, None] * grad_y[None, :]
                if CLIP:
                    grad = tl.minimum(tl.maximum(grad, -clip), clip)
                grad_forget = tl.sum(tl.sum(grad * (before - update), axis=1), axis=0)
                tl.store(grad_forget_ptr + token, grad_forget)
                delta = grad * ((1.0 - forget) * (1.0 - update * update))
                grad_key = tl.sum(delta * value[None, :], axis=1)
                tl.store(grad_key_ptr + token * K + row, grad_key, mask=rows)
                grad_value = tl.sum(delta * key[:, None], axis=0)
                tl.store(grad_value_ptr + token * V + column, grad_value, mask=columns)
                grad_weight += _times(tl.trans(before), delta, weight.dtype)
                grad = forget * grad + _times(delta, across, weight.dtype)
            tl.debug_barrier()
        tl.store(grad_initial_ptr + own + tile, grad, mask=inside)
        partial = grad_weight_ptr + (sequence * N + head) * (V * V)
        tl.store(partial + square, grad_weight, mask=columns[:, None] & columns[None, :])
