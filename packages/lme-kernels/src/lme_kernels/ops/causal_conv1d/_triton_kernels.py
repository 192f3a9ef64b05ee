"""Kernels of the depthwise causal convolution: a program walks a stretch of tokens.

It keeps the last inputs of its channels in registers, so that each is loaded once, and in the
backward, which walks from the last token to the first, the gradients before the activation of the
tokens after, which are so never stored.
"""

import triton
import triton.language as tl

from lme_kernels._triton_launch import thin_launch


@triton.jit
def _taps(weight_ptr, channel, here, W: tl.constexpr):
    """Weights by how many tokens back their input is, in float32."""
    taps = ()
    for d in tl.static_range(W):
        tap = tl.load(weight_ptr + channel * W + W - 1 - d, mask=here, other=0.0)
        taps = taps + (tap.to(tl.float32),)  # noqa: RUF005
    return taps


@triton.jit
def _back(x_ptr, channel, here, token, stride, T, COUNT: tl.constexpr):
    """Load the rows of `COUNT` tokens from `token`, shape (1,), backwards; zeros where none is."""
    rows = ()
    for u in tl.static_range(COUNT):
        each = token - u
        live = here & (each >= 0) & (each < T)
        offset = each.to(tl.int64) * stride
        row = tl.load(x_ptr + offset + channel, mask=live, other=0.0)
        rows = rows + (row.to(tl.float32),)  # noqa: RUF005
    return rows


@triton.jit
def _pushed(newest, rows, COUNT: tl.constexpr):
    """The newest row before the others, of which the last drops out."""
    result = (newest,)
    for i in tl.static_range(COUNT - 1):
        result = result + (rows[i],)  # noqa: RUF005
    return result


@triton.jit
def _place(position_ptr, owner_ptr, token, T, S, PACKED: tl.constexpr, OWNED: tl.constexpr):
    """Place of a token in its sequence, and the sequence if there is a state before it."""
    live = (token >= 0) & (token < T)
    owner = token.to(tl.int64) // S
    # A token that is not there is far from the start of its sequence: it reads no state.
    position = tl.where(live, token % S, 1 << 30)
    if PACKED:
        position = tl.load(position_ptr + token, mask=live, other=1 << 30)
        if OWNED:
            owner = tl.load(owner_ptr + token, mask=live, other=0)
    return position, owner


@triton.jit
def _input(
    x,
    initial_ptr,
    channel,
    here,
    position,
    owner,
    C,
    D: tl.constexpr,
    W: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
):
    """What the token at `position` sees `D` tokens back, where `x` is, in its sequence or before."""
    if D > 0:
        x = tl.where(position >= D, x, 0.0)
        if HAS_INITIAL:
            offset = (owner * C + channel) * (W - 1) + W - 1 + position - D
            x += tl.load(initial_ptr + offset, mask=here & (position < D), other=0.0)
    return x


@triton.jit
def _seen(
    inputs,
    oldest,
    initial_ptr,
    channel,
    here,
    position,
    owner,
    C,
    W: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
):
    """What a token sees, by how many tokens back: its own input first, `oldest` last."""
    seen = ()
    for d in tl.static_range(W):
        x = oldest if d == W - 1 else inputs[d]
        x = _input(x, initial_ptr, channel, here, position, owner, C, d, W, HAS_INITIAL)
        seen = seen + (x,)  # noqa: RUF005
    return seen


@triton.jit
def _dot(total, rows, taps, COUNT: tl.constexpr):
    for d in tl.static_range(COUNT):
        total += rows[d] * taps[d]
    return total


@triton.jit
def _added(sums, factor, rows, COUNT: tl.constexpr):
    result = ()
    for d in tl.static_range(COUNT):
        result = result + (sums[d] + factor * rows[d],)  # noqa: RUF005
    return result


@triton.jit
def _cut(rows, inner, COUNT: tl.constexpr):
    """The first rows where `inner`, else zeros."""
    result = ()
    for d in tl.static_range(COUNT):
        result = result + (tl.where(inner, rows[d], 0.0),)  # noqa: RUF005
    return result


@triton.jit
def _shifted(rows, last, COUNT: tl.constexpr):
    """The rows but the first, and `last`."""
    result = ()
    for d in tl.static_range(1, COUNT):
        result = result + (rows[d],)  # noqa: RUF005
    return result + (last,)  # noqa: RUF005


@triton.jit
def _zeros(zero, COUNT: tl.constexpr):
    result = ()
    for _ in tl.static_range(COUNT):
        result = result + (zero,)  # noqa: RUF005
    return result


@thin_launch
@triton.jit(do_not_specialize=["T", "S"])
def forward_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    initial_ptr,
    position_ptr,
    owner_ptr,
    y_ptr,
    x_stride,
    T,
    S,
    C,
    W: tl.constexpr,
    SILU: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    PACKED: tl.constexpr,
    AHEAD: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    start = tl.program_id(0) * BLOCK_T
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    here = channel < C
    taps = _taps(weight_ptr, channel, here, W)
    bias = tl.zeros((BLOCK_C,), dtype=tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + channel, mask=here, other=0.0).to(tl.float32)
    KEPT: tl.constexpr = W - 1 if W > 1 else 1
    # Tokens are tensors of one element: the interpreter knows no other integers.
    one = tl.zeros((1,), dtype=tl.int32)
    before = _back(x_ptr, channel, here, one + start - 1, x_stride, T, KEPT)
    for first in range(start, min(start + BLOCK_T, T), AHEAD):
        rows = _back(x_ptr, channel, here, one + first + AHEAD - 1, x_stride, T, AHEAD)
        for u in tl.static_range(AHEAD):
            token = one + first + u
            position, owner = _place(position_ptr, owner_ptr, token, T, S, PACKED, HAS_INITIAL)
            newest = rows[AHEAD - 1 - u]
            z = bias + newest * taps[0]
            for d in tl.static_range(1, W):
                x = _input(
                    before[d - 1], initial_ptr, channel, here, position, owner, C, d, W, HAS_INITIAL
                )
                z += x * taps[d]
            if SILU:
                z = z / (1.0 + tl.exp(-z))
            tl.store(y_ptr + token.to(tl.int64) * C + channel, z, mask=here & (token < T))
            before = _pushed(newest, before, KEPT)


@thin_launch
@triton.jit(do_not_specialize=["T", "S"])
def backward_kernel(
    grad_y_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    initial_ptr,
    position_ptr,
    owner_ptr,
    grad_x_ptr,
    partial_ptr,
    first_ptr,
    grad_y_stride,
    x_stride,
    T,
    S,
    C,
    W: tl.constexpr,
    SILU: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    PACKED: tl.constexpr,
    AHEAD: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    start = tl.program_id(0) * BLOCK_T
    end = min(start + BLOCK_T, T)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    here = channel < C
    taps = _taps(weight_ptr, channel, here, W)
    zero = tl.zeros((BLOCK_C,), dtype=tl.float32)
    bias = zero
    if HAS_BIAS:
        bias = tl.load(bias_ptr + channel, mask=here, other=0.0).to(tl.float32)
    KEPT: tl.constexpr = W - 1 if W > 1 else 1
    # The W - 1 tokens after the stretch send gradients into it.
    top = tl.zeros((1,), dtype=tl.int32) + end + W - 2
    inputs = _back(x_ptr, channel, here, top, x_stride, T, KEPT)
    after = _zeros(zero, KEPT)
    grad_taps = _zeros(zero, W)
    grad_bias = zero
    for step in range(0, end - start + W - 1, AHEAD):
        oldest_rows = _back(x_ptr, channel, here, top - step - W + 1, x_stride, T, AHEAD)
        grads = _back(grad_y_ptr, channel, here, top - step, grad_y_stride, T, AHEAD)
        for u in tl.static_range(AHEAD):
            token = top - step - u
            position, owner = _place(position_ptr, owner_ptr, token, T, S, PACKED, HAS_INITIAL)
            own = (token >= start) & (token < end)
            seen = _seen(
                inputs, oldest_rows[u], initial_ptr, channel, here, position, owner, C, W,
                HAS_INITIAL,
            )  # fmt: skip
            grad = grads[u]
            if SILU:
                z = _dot(bias, seen, taps, W)
                sigmoid = 1.0 / (1.0 + tl.exp(-z))
                grad *= sigmoid * (1.0 + z * (1.0 - sigmoid))
            counted = tl.where(own, grad, 0.0)
            grad_taps = _added(grad_taps, counted, seen, W)
            grad_bias += counted
            reached = _pushed(grad, after, W)
            grad_x = _dot(zero, reached, taps, W)
            tl.store(grad_x_ptr + token.to(tl.int64) * C + channel, grad_x, mask=here & own)
            if HAS_INITIAL:
                offset = (owner * (W - 1) + position) * C
                tl.store(first_ptr + offset + channel, grad, mask=here & own & (position < W - 1))
            # No token is reached from a later sequence.
            inner = position > 0
            after = _cut(reached, inner, KEPT)
            inputs = _shifted(inputs, oldest_rows[u], KEPT)
    # One row of partial gradients a program: W taps, then the bias.
    row = partial_ptr + tl.program_id(0).to(tl.int64) * (W + 1) * C + channel
    for d in tl.static_range(W):
        tl.store(row + (W - 1 - d) * C, grad_taps[d], mask=here)
    tl.store(row + W * C, grad_bias, mask=here)
