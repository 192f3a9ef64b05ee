"""Kernels of long short-term memory: the walk over the tokens and the walk back.

Matrices and sums are in the order candidate, forget, input, output everywhere.
"""

import triton
import triton.language as tl

from lme_kernels._triton_launch import thin_launch
from lme_kernels.ops.rnn._triton_scan import (
    bounds_of,
    load_matrix,
    load_steps,
    product,
    sigmoid,
    tanh,
)


@triton.jit
def _apply(stored, ptr, index, state, D, BLOCK_D, DOT: tl.constexpr, RELOAD: tl.constexpr):
    """Multiply a matrix, held or read again, with the state."""
    matrix = stored
    if RELOAD:
        matrix = load_matrix(ptr, index, D, BLOCK_D, DOT)
    return product(matrix, state, DOT)


@thin_launch
@triton.jit(do_not_specialize=["S", "sequences"])
def forward_kernel(
    x_ptr,
    forget_ptr,
    input_ptr,
    output_ptr,
    weight_ptr,
    forget_weight_ptr,
    input_weight_ptr,
    output_weight_ptr,
    initial_ptr,
    initial_cell_ptr,
    cu_ptr,
    y_ptr,
    kept_ptr,
    final_ptr,
    final_cell_ptr,
    S,
    sequences,
    plane,
    x_token,
    x_head,
    forget_token,
    forget_head,
    input_token,
    input_head,
    output_token,
    output_head,
    N: tl.constexpr,
    D: tl.constexpr,
    X_GROUP: tl.constexpr,
    FORGET_GROUP: tl.constexpr,
    INPUT_GROUP: tl.constexpr,
    OUTPUT_GROUP: tl.constexpr,
    WEIGHT_GROUP: tl.constexpr,
    FORGET_WEIGHT_GROUP: tl.constexpr,
    INPUT_WEIGHT_GROUP: tl.constexpr,
    OUTPUT_WEIGHT_GROUP: tl.constexpr,
    SAVE: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    HAS_INITIAL_CELL: tl.constexpr,
    PACKED: tl.constexpr,
    DOT: tl.constexpr,
    EXACT: tl.constexpr,
    RELOAD: tl.constexpr,
    AHEAD: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    head = tl.program_id(1)
    sequence = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B).to(tl.int64)[None, :]
    channel = tl.arange(0, BLOCK_D)[:, None]
    mask = (sequence < sequences) & (channel < D)
    start, length = bounds_of(cu_ptr, sequence, sequences, S, PACKED)
    steps = tl.max(length)
    of_weight, of_forget = head // WEIGHT_GROUP, head // FORGET_WEIGHT_GROUP
    of_input, of_output = head // INPUT_WEIGHT_GROUP, head // OUTPUT_WEIGHT_GROUP
    weight = load_matrix(weight_ptr, of_weight, D, BLOCK_D, DOT)
    forget = load_matrix(forget_weight_ptr, of_forget, D, BLOCK_D, DOT)
    entry = load_matrix(input_weight_ptr, of_input, D, BLOCK_D, DOT)
    output = load_matrix(output_weight_ptr, of_output, D, BLOCK_D, DOT)
    own = (sequence * N + head) * D + channel
    state = tl.zeros((BLOCK_D, BLOCK_B), dtype=tl.float32)
    cell = state
    if HAS_INITIAL:
        state = tl.load(initial_ptr + own, mask=mask, other=0.0).to(tl.float32)
    if HAS_INITIAL_CELL:
        cell = tl.load(initial_cell_ptr + own, mask=mask, other=0.0).to(tl.float32)
    x_ptrs = x_ptr + start * x_token + (head // X_GROUP).to(tl.int64) * x_head
    forget_ptrs = forget_ptr + start * forget_token
    forget_ptrs += (head // FORGET_GROUP).to(tl.int64) * forget_head
    input_ptrs = input_ptr + start * input_token
    input_ptrs += (head // INPUT_GROUP).to(tl.int64) * input_head
    output_ptrs = output_ptr + start * output_token
    output_ptrs += (head // OUTPUT_GROUP).to(tl.int64) * output_head
    result = (start * N + head) * D
    zero = tl.zeros((1, 1), dtype=tl.int32)
    xs = load_steps(x_ptrs, channel, mask, zero, length, x_token, AHEAD)
    forgets = load_steps(forget_ptrs, channel, mask, zero, length, forget_token, AHEAD)
    inputs = load_steps(input_ptrs, channel, mask, zero, length, input_token, AHEAD)
    outputs = load_steps(output_ptrs, channel, mask, zero, length, output_token, AHEAD)
    for t in range(0, steps, AHEAD):
        xs_here, forgets_here, inputs_here, outputs_here = xs, forgets, inputs, outputs
        following = zero + t + AHEAD
        xs = load_steps(x_ptrs, channel, mask, following, length, x_token, AHEAD)
        forgets = load_steps(forget_ptrs, channel, mask, following, length, forget_token, AHEAD)
        inputs = load_steps(input_ptrs, channel, mask, following, length, input_token, AHEAD)
        outputs = load_steps(output_ptrs, channel, mask, following, length, output_token, AHEAD)
        for u in tl.static_range(AHEAD):
            step = zero + t + u
            live = step < length
            g_sum = _apply(weight, weight_ptr, of_weight, state, D, BLOCK_D, DOT, RELOAD)
            g_sum += xs_here[u].to(tl.float32)
            f_sum = _apply(forget, forget_weight_ptr, of_forget, state, D, BLOCK_D, DOT, RELOAD)
            f_sum += forgets_here[u].to(tl.float32)
            i_sum = _apply(entry, input_weight_ptr, of_input, state, D, BLOCK_D, DOT, RELOAD)
            i_sum += inputs_here[u].to(tl.float32)
            o_sum = _apply(output, output_weight_ptr, of_output, state, D, BLOCK_D, DOT, RELOAD)
            o_sum += outputs_here[u].to(tl.float32)
            offset = result + step.to(tl.int64) * (N * D)
            if SAVE:
                tl.store(kept_ptr + offset + channel, g_sum, mask=mask & live)
                tl.store(kept_ptr + plane + offset + channel, f_sum, mask=mask & live)
                tl.store(kept_ptr + 2 * plane + offset + channel, i_sum, mask=mask & live)
                tl.store(kept_ptr + 3 * plane + offset + channel, o_sum, mask=mask & live)
                tl.store(kept_ptr + 4 * plane + offset + channel, cell, mask=mask & live)
            new_cell = sigmoid(f_sum) * cell + sigmoid(i_sum) * tanh(g_sum, EXACT)
            cell = tl.where(live, new_cell, cell)
            state = tl.where(live, sigmoid(o_sum) * tanh(new_cell, EXACT), state)
            tl.store(y_ptr + offset + channel, state, mask=mask & live)
    tl.store(final_ptr + own, state, mask=mask)
    tl.store(final_cell_ptr + own, cell, mask=mask)


@thin_launch
@triton.jit(do_not_specialize=["S", "sequences"])
def backward_kernel(
    grad_y_ptr,
    grad_final_ptr,
    grad_final_cell_ptr,
    kept_ptr,
    weight_ptr,
    forget_weight_ptr,
    input_weight_ptr,
    output_weight_ptr,
    cu_ptr,
    delta_ptr,
    forget_delta_ptr,
    input_delta_ptr,
    output_delta_ptr,
    grad_initial_ptr,
    grad_initial_cell_ptr,
    S,
    sequences,
    plane,
    clip,
    N: tl.constexpr,
    D: tl.constexpr,
    WEIGHT_GROUP: tl.constexpr,
    FORGET_WEIGHT_GROUP: tl.constexpr,
    INPUT_WEIGHT_GROUP: tl.constexpr,
    OUTPUT_WEIGHT_GROUP: tl.constexpr,
    CLIP: tl.constexpr,
    HAS_GRAD_Y: tl.constexpr,
    HAS_GRAD_FINAL: tl.constexpr,
    HAS_GRAD_FINAL_CELL: tl.constexpr,
    PACKED: tl.constexpr,
    DOT: tl.constexpr,
    EXACT: tl.constexpr,
    RELOAD: tl.constexpr,
    AHEAD: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    head = tl.program_id(1)
    sequence = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B).to(tl.int64)[None, :]
    channel = tl.arange(0, BLOCK_D)[:, None]
    mask = (sequence < sequences) & (channel < D)
    start, length = bounds_of(cu_ptr, sequence, sequences, S, PACKED)
    steps = tl.max(length)
    of_weight, of_forget = head // WEIGHT_GROUP, head // FORGET_WEIGHT_GROUP
    of_input, of_output = head // INPUT_WEIGHT_GROUP, head // OUTPUT_WEIGHT_GROUP
    weight = load_matrix(weight_ptr, of_weight, D, BLOCK_D, DOT)
    forget = load_matrix(forget_weight_ptr, of_forget, D, BLOCK_D, DOT)
    entry = load_matrix(input_weight_ptr, of_input, D, BLOCK_D, DOT)
    output = load_matrix(output_weight_ptr, of_output, D, BLOCK_D, DOT)
    own = (sequence * N + head) * D + channel
    grad = tl.zeros((BLOCK_D, BLOCK_B), dtype=tl.float32)
    grad_cell = grad
    if HAS_GRAD_FINAL:
        grad = tl.load(grad_final_ptr + own, mask=mask, other=0.0).to(tl.float32)
    if HAS_GRAD_FINAL_CELL:
        grad_cell = tl.load(grad_final_cell_ptr + own, mask=mask, other=0.0).to(tl.float32)
    # Step 0 is the last token of each sequence.
    last = ((start + length - 1) * N + head) * D
    zero = tl.zeros((1, 1), dtype=tl.int32)
    kept = kept_ptr + last
    gs = load_steps(kept, channel, mask, zero, length, -N * D, AHEAD)
    forgets = load_steps(kept + plane, channel, mask, zero, length, -N * D, AHEAD)
    inputs = load_steps(kept + 2 * plane, channel, mask, zero, length, -N * D, AHEAD)
    outputs = load_steps(kept + 3 * plane, channel, mask, zero, length, -N * D, AHEAD)
    cells = load_steps(kept + 4 * plane, channel, mask, zero, length, -N * D, AHEAD)
    grads = gs
    if HAS_GRAD_Y:
        grads = load_steps(grad_y_ptr + last, channel, mask, zero, length, -N * D, AHEAD)
    for t in range(0, steps, AHEAD):
        gs_here, forgets_here, inputs_here = gs, forgets, inputs
        outputs_here, cells_here, grads_here = outputs, cells, grads
        following = zero + t + AHEAD
        gs = load_steps(kept, channel, mask, following, length, -N * D, AHEAD)
        forgets = load_steps(kept + plane, channel, mask, following, length, -N * D, AHEAD)
        inputs = load_steps(kept + 2 * plane, channel, mask, following, length, -N * D, AHEAD)
        outputs = load_steps(kept + 3 * plane, channel, mask, following, length, -N * D, AHEAD)
        cells = load_steps(kept + 4 * plane, channel, mask, following, length, -N * D, AHEAD)
        if HAS_GRAD_Y:
            grads = load_steps(grad_y_ptr + last, channel, mask, following, length, -N * D, AHEAD)
        for u in tl.static_range(AHEAD):
            step = zero + t + u
            live = step < length
            g = tanh(gs_here[u].to(tl.float32), EXACT)
            f = sigmoid(forgets_here[u].to(tl.float32))
            i = sigmoid(inputs_here[u].to(tl.float32))
            o = sigmoid(outputs_here[u].to(tl.float32))
            before = cells_here[u].to(tl.float32)
            opened = tanh(f * before + i * g, EXACT)
            total = grad
            if HAS_GRAD_Y:
                total += grads_here[u].to(tl.float32)
            if CLIP:
                total = tl.minimum(tl.maximum(total, -clip), clip)
            total_cell = grad_cell + total * (o * (1.0 - opened * opened))
            if CLIP:
                total_cell = tl.minimum(tl.maximum(total_cell, -clip), clip)
            g_delta = total_cell * (i * (1.0 - g * g))
            f_delta = total_cell * (before * (f * (1.0 - f)))
            i_delta = total_cell * (g * (i * (1.0 - i)))
            o_delta = total * (opened * (o * (1.0 - o)))
            offset = last - step.to(tl.int64) * (N * D)
            tl.store(delta_ptr + offset + channel, g_delta, mask=mask & live)
            tl.store(forget_delta_ptr + offset + channel, f_delta, mask=mask & live)
            tl.store(input_delta_ptr + offset + channel, i_delta, mask=mask & live)
            tl.store(output_delta_ptr + offset + channel, o_delta, mask=mask & live)
            earlier = _apply(weight, weight_ptr, of_weight, g_delta, D, BLOCK_D, DOT, RELOAD)
            earlier += _apply(
                forget, forget_weight_ptr, of_forget, f_delta, D, BLOCK_D, DOT, RELOAD
            )
            earlier += _apply(entry, input_weight_ptr, of_input, i_delta, D, BLOCK_D, DOT, RELOAD)
            earlier += _apply(
                output, output_weight_ptr, of_output, o_delta, D, BLOCK_D, DOT, RELOAD
            )
            grad = tl.where(live, earlier, grad)
            grad_cell = tl.where(live, total_cell * f, grad_cell)
    tl.store(grad_initial_ptr + own, grad, mask=mask)
    tl.store(grad_initial_cell_ptr + own, grad_cell, mask=mask)
