"""Kernels of the gated recurrent unit: the walk over the tokens and the walk back."""

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


@thin_launch
@triton.jit(do_not_specialize=["S", "sequences"])
def forward_kernel(
    x_ptr,
    forget_ptr,
    reset_ptr,
    weight_ptr,
    forget_weight_ptr,
    reset_weight_ptr,
    initial_ptr,
    cu_ptr,
    y_ptr,
    kept_ptr,
    final_ptr,
    S,
    sequences,
    plane,
    x_token,
    x_head,
    forget_token,
    forget_head,
    reset_token,
    reset_head,
    N: tl.constexpr,
    D: tl.constexpr,
    X_GROUP: tl.constexpr,
    FORGET_GROUP: tl.constexpr,
    RESET_GROUP: tl.constexpr,
    WEIGHT_GROUP: tl.constexpr,
    FORGET_WEIGHT_GROUP: tl.constexpr,
    RESET_WEIGHT_GROUP: tl.constexpr,
    SAVE: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
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
    update_stored = load_matrix(weight_ptr, head // WEIGHT_GROUP, D, BLOCK_D, DOT)
    forget_stored = load_matrix(forget_weight_ptr, head // FORGET_WEIGHT_GROUP, D, BLOCK_D, DOT)
    reset_stored = load_matrix(reset_weight_ptr, head // RESET_WEIGHT_GROUP, D, BLOCK_D, DOT)
    own = (sequence * N + head) * D + channel
    state = tl.zeros((BLOCK_D, BLOCK_B), dtype=tl.float32)
    if HAS_INITIAL:
        state = tl.load(initial_ptr + own, mask=mask, other=0.0).to(tl.float32)
    x_ptrs = x_ptr + start * x_token + (head // X_GROUP).to(tl.int64) * x_head
    forget_ptrs = forget_ptr + start * forget_token
    forget_ptrs += (head // FORGET_GROUP).to(tl.int64) * forget_head
    reset_ptrs = reset_ptr + start * reset_token
    reset_ptrs += (head // RESET_GROUP).to(tl.int64) * reset_head
    result = (start * N + head) * D
    zero = tl.zeros((1, 1), dtype=tl.int32)
    xs = load_steps(x_ptrs, channel, mask, zero, length, x_token, AHEAD)
    forgets = load_steps(forget_ptrs, channel, mask, zero, length, forget_token, AHEAD)
    resets = load_steps(reset_ptrs, channel, mask, zero, length, reset_token, AHEAD)
    for t in range(0, steps, AHEAD):
        xs_here, forgets_here, resets_here = xs, forgets, resets
        following = zero + t + AHEAD
        xs = load_steps(x_ptrs, channel, mask, following, length, x_token, AHEAD)
        forgets = load_steps(forget_ptrs, channel, mask, following, length, forget_token, AHEAD)
        resets = load_steps(reset_ptrs, channel, mask, following, length, reset_token, AHEAD)
        for u in tl.static_range(AHEAD):
            update, forget, reset = update_stored, forget_stored, reset_stored
            step = zero + t + u
            live = step < length
            if RELOAD:
                index = head // FORGET_WEIGHT_GROUP
                forget = load_matrix(forget_weight_ptr, index, D, BLOCK_D, DOT)
            forget_sum = product(forget, state, DOT) + forgets_here[u].to(tl.float32)
            if RELOAD:
                index = head // RESET_WEIGHT_GROUP
                reset = load_matrix(reset_weight_ptr, index, D, BLOCK_D, DOT)
            reset_sum = product(reset, state, DOT) + resets_here[u].to(tl.float32)
            f, r = sigmoid(forget_sum), sigmoid(reset_sum)
            if RELOAD:
                update = load_matrix(weight_ptr, head // WEIGHT_GROUP, D, BLOCK_D, DOT)
            update_sum = product(update, r * state, DOT) + xs_here[u].to(tl.float32)
            z = tanh(update_sum, EXACT)
            state = tl.where(live, z + f * (state - z), state)
            offset = result + step.to(tl.int64) * (N * D)
            tl.store(y_ptr + offset + channel, state, mask=mask & live)
            if SAVE:
                tl.store(kept_ptr + offset + channel, update_sum, mask=mask & live)
                tl.store(kept_ptr + plane + offset + channel, forget_sum, mask=mask & live)
                tl.store(kept_ptr + 2 * plane + offset + channel, reset_sum, mask=mask & live)
    tl.store(final_ptr + own, state, mask=mask)


@thin_launch
@triton.jit(do_not_specialize=["S", "sequences"])
def backward_kernel(
    grad_y_ptr,
    grad_final_ptr,
    kept_ptr,
    before_ptr,
    weight_ptr,
    forget_weight_ptr,
    reset_weight_ptr,
    cu_ptr,
    delta_ptr,
    forget_delta_ptr,
    reset_delta_ptr,
    reset_before_ptr,
    grad_initial_ptr,
    S,
    sequences,
    plane,
    clip,
    N: tl.constexpr,
    D: tl.constexpr,
    WEIGHT_GROUP: tl.constexpr,
    FORGET_WEIGHT_GROUP: tl.constexpr,
    RESET_WEIGHT_GROUP: tl.constexpr,
    CLIP: tl.constexpr,
    HAS_GRAD_Y: tl.constexpr,
    HAS_GRAD_FINAL: tl.constexpr,
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
    update_stored = load_matrix(weight_ptr, head // WEIGHT_GROUP, D, BLOCK_D, DOT)
    forget_stored = load_matrix(forget_weight_ptr, head // FORGET_WEIGHT_GROUP, D, BLOCK_D, DOT)
    reset_stored = load_matrix(reset_weight_ptr, head // RESET_WEIGHT_GROUP, D, BLOCK_D, DOT)
    own = (sequence * N + head) * D + channel
    grad = tl.zeros((BLOCK_D, BLOCK_B), dtype=tl.float32)
    if HAS_GRAD_FINAL:
        grad = tl.load(grad_final_ptr + own, mask=mask, other=0.0).to(tl.float32)
    # Step 0 is the last token of each sequence.
    last = ((start + length - 1) * N + head) * D
    update_ptrs, forget_ptrs = kept_ptr + last, kept_ptr + plane + last
    reset_ptrs, before_ptrs = kept_ptr + 2 * plane + last, before_ptr + last
    zero = tl.zeros((1, 1), dtype=tl.int32)
    updates = load_steps(update_ptrs, channel, mask, zero, length, -N * D, AHEAD)
    forgets = load_steps(forget_ptrs, channel, mask, zero, length, -N * D, AHEAD)
    resets = load_steps(reset_ptrs, channel, mask, zero, length, -N * D, AHEAD)
    befores = load_steps(before_ptrs, channel, mask, zero, length, -N * D, AHEAD)
    grads = befores
    if HAS_GRAD_Y:
        grads = load_steps(grad_y_ptr + last, channel, mask, zero, length, -N * D, AHEAD)
    for t in range(0, steps, AHEAD):
        updates_here, forgets_here, resets_here = updates, forgets, resets
        befores_here, grads_here = befores, grads
        following = zero + t + AHEAD
        updates = load_steps(update_ptrs, channel, mask, following, length, -N * D, AHEAD)
        forgets = load_steps(forget_ptrs, channel, mask, following, length, -N * D, AHEAD)
        resets = load_steps(reset_ptrs, channel, mask, following, length, -N * D, AHEAD)
        befores = load_steps(before_ptrs, channel, mask, following, length, -N * D, AHEAD)
        if HAS_GRAD_Y:
            grads = load_steps(grad_y_ptr + last, channel, mask, following, length, -N * D, AHEAD)
        for u in tl.static_range(AHEAD):
            update, forget, reset = update_stored, forget_stored, reset_stored
            step = zero + t + u
            live = step < length
            z = tanh(updates_here[u].to(tl.float32), EXACT)
            f = sigmoid(forgets_here[u].to(tl.float32))
            r = sigmoid(resets_here[u].to(tl.float32))
            before = befores_here[u].to(tl.float32)
            total = grad
            if HAS_GRAD_Y:
                total += grads_here[u].to(tl.float32)
            if CLIP:
                total = tl.minimum(tl.maximum(total, -clip), clip)
            delta = total * ((1.0 - f) * (1.0 - z * z))
            forget_delta = total * ((before - z) * (f * (1.0 - f)))
            if RELOAD:
                update = load_matrix(weight_ptr, head // WEIGHT_GROUP, D, BLOCK_D, DOT)
            through = product(update, delta, DOT)
            reset_delta = through * (before * (r * (1.0 - r)))
            if RELOAD:
                index = head // FORGET_WEIGHT_GROUP
                forget = load_matrix(forget_weight_ptr, index, D, BLOCK_D, DOT)
            earlier = total * f + through * r + product(forget, forget_delta, DOT)
            if RELOAD:
                index = head // RESET_WEIGHT_GROUP
                reset = load_matrix(reset_weight_ptr, index, D, BLOCK_D, DOT)
            earlier += product(reset, reset_delta, DOT)
            grad = tl.where(live, earlier, grad)
            offset = last - step.to(tl.int64) * (N * D)
            tl.store(delta_ptr + offset + channel, delta, mask=mask & live)
            tl.store(forget_delta_ptr + offset + channel, forget_delta, mask=mask & live)
            tl.store(reset_delta_ptr + offset + channel, reset_delta, mask=mask & live)
            tl.store(reset_before_ptr + offset + channel, r * before, mask=mask & live)
    tl.store(grad_initial_ptr + own, grad, mask=mask)
