"""States of chunks in Triton: a program walks a sequence with a block of one head's state.

Walked backwards with queries for keys and gradients of the outputs for values, the same kernel
gives the gradients of the states after each chunk.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lme_kernels._triton_chunks import (
    Slots,
    as_tokens,
    block_of,
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
from lme_kernels.ops.linear_attention.settings import ChunkSettings
from lme_kernels.tuning import ceil_div, next_power_of_two

# What decays: nothing, a state by a number a head, or by one a row.
NOTHING, HEAD, CHANNEL = 0, 1, 2


def kind_of_sums(decay: Tensor | None) -> int:
    """Say what decays by sums from `sum_decays`."""
    if decay is None:
        return NOTHING
    return HEAD if decay.ndim == 3 else CHANNEL


@triton.jit
def _sums(step, length, dtype: tl.constexpr, C: tl.constexpr):
    """Sums over rows, that of the last token from there on: a scan rounds each row its own way."""
    row = tl.arange(0, C)[:, None]
    until = tl.cumsum(step.to(dtype), axis=0)
    last = tl.sum(tl.where(row == length - 1, until, 0.0), axis=0, keep_dims=True)
    return tl.where(row < length, until, last)


@thin_launch
@triton.jit(do_not_specialize=["S", "count"])
def _decay_kernel(
    log_decay_ptr,
    factor_ptr,
    table_ptr,
    decay_ptr,
    weight_ptr,
    S,
    count,
    decay_stride,
    factor_stride,
    N: tl.constexpr,
    HAS_DECAY: tl.constexpr,
    HAS_FACTOR: tl.constexpr,
    PACKED: tl.constexpr,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum logarithms over the tokens of each chunk, and turn them so that tokens are neighbours."""
    blocks: tl.constexpr = (N + BLOCK - 1) // BLOCK
    slot = (tl.program_id(0) // blocks).to(tl.int64)
    first = (tl.program_id(0) % blocks) * BLOCK
    start, length = slot_of(table_ptr, slot, count, S, C, PACKED)
    head = (first + tl.arange(0, BLOCK)).to(tl.int64)
    offset = (head * count + slot)[None, :] * C + tl.arange(0, C)[:, None]
    here = (head < N)[None, :]
    if HAS_DECAY:
        step = load_rows(log_decay_ptr, start, length, decay_stride, first, C, N, BLOCK)
        tl.store(decay_ptr + offset, _sums(step, length, decay_ptr.dtype.element_ty, C), mask=here)
    if HAS_FACTOR:
        weight = load_rows(factor_ptr, start, length, factor_stride, first, C, N, BLOCK)
        tl.store(weight_ptr + offset, weight.to(tl.float32), mask=here)


@thin_launch
@triton.jit(do_not_specialize=["S", "count"])
def _channel_decay_kernel(
    log_decay_ptr,
    table_ptr,
    decay_ptr,
    S,
    count,
    stride,
    head_stride,
    N: tl.constexpr,
    K: tl.constexpr,
    PACKED: tl.constexpr,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
):
    blocks: tl.constexpr = (K + BLOCK - 1) // BLOCK
    first = (tl.program_id(0) % blocks) * BLOCK
    program = tl.program_id(0) // blocks
    head, slot = program % N, (program // N).to(tl.int64)
    start, length = slot_of(table_ptr, slot, count, S, C, PACKED)
    own = log_decay_ptr + head.to(tl.int64) * head_stride
    step = load_rows(own, start, length, stride, first, C, K, BLOCK)
    until = _sums(step, length, tl.float32, C)
    store_rows(decay_ptr, until, (slot * N + head) * C, C, K, first, C, K, BLOCK)


def sum_channel_decays(log_decay: Tensor, slots: Slots) -> Tensor:
    """Sum the decays of each channel over the tokens of each chunk.

    Args:
        log_decay: Shape (B, S, N, K) or (T, N, K).
        slots: The chunks.

    Returns:
        Sums up to each token: float32, shape (slots, N, chunk, K).
    """
    N, K = log_decay.shape[-2:]
    decay = log_decay.new_empty((slots.count, N, slots.chunk, K), dtype=torch.float32)
    if decay.numel() == 0:
        return decay
    log_decay, stride, head_stride = as_tokens(log_decay)
    block = min(64, block_of(K))
    _channel_decay_kernel[(slots.count * N * ceil_div(K, block),)](
        log_decay,
        slots.table,
        decay,
        slots.S,
        slots.count,
        stride,
        head_stride,
        N=N,
        K=K,
        PACKED=slots.table is not None,
        C=slots.chunk,
        BLOCK=block,
        num_warps=4,
    )
    return decay


def sum_decays(
    log_decay: Tensor | None, factor: Tensor | None, slots: Slots, *, exact: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Sum the decays of each head over the tokens of each chunk.

    Args:
        log_decay: Shape (B, S, N) or (T, N); `None` for none.
        factor: Factor of each key, of the same shape; `None` for none.
        slots: The chunks.
        exact: Sum in float64. Decays are exponentials of differences of sums, so that in float32 a
            strong decay in a chunk takes digits from every weak one after it.

    Returns:
        Sums of `log_decay` up to each token, float64 if `exact` and float32 otherwise, and the
        factors, 0 past the last token, float32: shape (N, slots, chunk).
    """
    given = log_decay if log_decay is not None else factor
    if given is None:
        return None, None
    N = given.shape[-1]
    shape = (N, slots.count, slots.chunk)
    decay, weight = (
        None if each is None else torch.empty(shape, dtype=dtype, device=given.device)
        for each, dtype in (
            (log_decay, torch.float64 if exact else torch.float32),
            (factor, torch.float32),
        )
    )
    if slots.count == 0:
        return decay, weight
    log_decay = None if log_decay is None else log_decay.contiguous()
    factor = None if factor is None else factor.contiguous()
    block = min(16, next_power_of_two(N))
    _decay_kernel[(slots.count * ceil_div(N, block),)](
        log_decay,
        factor,
        slots.table,
        decay,
        weight,
        slots.S,
        slots.count,
        N,
        N,
        N=N,
        HAS_DECAY=log_decay is not None,
        HAS_FACTOR=factor is not None,
        PACKED=slots.table is not None,
        C=slots.chunk,
        BLOCK=block,
        num_warps=4,
    )
    return decay, weight


@triton.jit
def exp_of(difference):
    """Exponential, in float32, of a difference of sums of logarithms."""
    return tl.exp(difference.to(tl.float32))


@triton.jit
def head_decay(decay_ptr, head, slot, count, C: tl.constexpr, INCLUSIVE: tl.constexpr):
    """Load a chunk's sums: up to each token, what each token reads with, and up to the last."""
    own = decay_ptr + (head.to(tl.int64) * count + slot) * C
    row = tl.arange(0, C)
    until = tl.load(own + row)
    reached = until
    if not INCLUSIVE:
        reached = tl.load(own + row - 1, mask=row > 0, other=0.0)
    return until, reached, tl.load(own + C - 1)


@triton.jit
def load_channels(ptr, row, channel, K: tl.constexpr):
    """Load sums of the channels of a chunk and head, 0 before its first token.

    `channel` is a tile, and `row` another that goes with it or a number.
    """
    mask = (channel < K) & (channel * 0 + row >= 0)
    return tl.load(ptr + row * K + channel, mask=mask, other=0.0)


@triton.jit
def _kept(
    decay_ptr,
    head,
    slot,
    count,
    first_key,
    N: tl.constexpr,
    K: tl.constexpr,
    DECAY: tl.constexpr,
    REVERSE: tl.constexpr,
    INCLUSIVE: tl.constexpr,
    C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Logarithms of what is left of each key at the end of a chunk, and of the state before it.

    If `REVERSE`, of what is left of that state when each token reads it. Tiles of tokens across.
    """
    if DECAY == 2:
        own = decay_ptr + (slot * N + head) * (C * K)
        row = tl.arange(0, C)[None, :]
        channel = first_key + tl.arange(0, BLOCK_K)[:, None]
        last = load_channels(own, C - 1, channel, K)
        if REVERSE:
            left = load_channels(own, row if INCLUSIVE else row - 1, channel, K)
        else:
            left = last - load_channels(own, row, channel, K)
    else:
        until, reached, last = head_decay(decay_ptr, head, slot, count, C, INCLUSIVE)
        left = reached[None, :] if REVERSE else (last - until)[None, :]
    return left, last


@thin_launch
@triton.jit(do_not_specialize=["S", "count"])
def _states_kernel(
    key_ptr,
    value_ptr,
    decay_ptr,
    weight_ptr,
    initial_ptr,
    cu_ptr,
    first_ptr,
    states_ptr,
    final_ptr,
    S,
    count,
    scale,
    key_stride,
    key_head,
    value_stride,
    value_head,
    N: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    KEY_GROUP: tl.constexpr,
    VALUE_GROUP: tl.constexpr,
    DECAY: tl.constexpr,
    HAS_FACTOR: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    PACKED: tl.constexpr,
    REVERSE: tl.constexpr,
    INCLUSIVE: tl.constexpr,
    PRECISION: tl.constexpr,
    C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    key_blocks: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    value_blocks: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    program = tl.program_id(0)
    first_value = (program % value_blocks) * BLOCK_V
    program = program // value_blocks
    first_key = (program % key_blocks) * BLOCK_K
    program = program // key_blocks
    head, sequence = program % N, program // N
    start, length, base = sequence_of(cu_ptr, first_ptr, sequence, S, C, PACKED)
    key_ptr += (head // KEY_GROUP).to(tl.int64) * key_head
    value_ptr += (head // VALUE_GROUP).to(tl.int64) * value_head
    state = tl.zeros((BLOCK_K, BLOCK_V), dtype=tl.float32)
    if HAS_INITIAL:
        state = load_state(initial_ptr, program, first_key, first_value, K, V, BLOCK_K, BLOCK_V).to(
            tl.float32
        )
    chunks = tl.cdiv(length, C)
    for step in range(chunks):
        place = step
        if REVERSE:
            place = chunks - 1 - step
        slot = base + place
        token, here = start + place * C, length - place * C
        key = load_columns(key_ptr, token, here, key_stride, first_key, C, K, BLOCK_K)
        value = load_rows(value_ptr, token, here, value_stride, first_value, C, V, BLOCK_V)
        store_state(
            states_ptr, state, slot * N + head, first_key, first_value, K, V, BLOCK_K, BLOCK_V
        )
        weight = tl.full((1, C), scale, dtype=tl.float32)
        if HAS_FACTOR:
            own = weight_ptr + (head.to(tl.int64) * count + slot) * C
            weight *= tl.load(own + tl.arange(0, C))[None, :]
        if DECAY != 0:
            left, last = _kept(
                decay_ptr, head, slot, count, first_key, N, K, DECAY, REVERSE, INCLUSIVE, C, BLOCK_K
            )
            weight = weight * exp_of(left)
            state *= exp_of(last)
        if DECAY != 0 or HAS_FACTOR:
            key = (key.to(tl.float32) * weight).to(value.dtype)
            state += tl.dot(key, value, input_precision=PRECISION)
        else:
            # A factor of everything is applied where it costs no rounding.
            state += tl.dot(key, value, input_precision=PRECISION) * scale
    store_state(final_ptr, state, program, first_key, first_value, K, V, BLOCK_K, BLOCK_V)


def walk_states(
    key: Tensor,
    value: Tensor,
    decay: Tensor | None,
    weight: Tensor | None,
    initial: Tensor | None,
    final: Tensor,
    slots: Slots,
    settings: ChunkSettings,
    *,
    scale: float = 1.0,
    reverse: bool = False,
    inclusive: bool = True,
) -> Tensor:
    """Compute the state before each chunk, or the gradient of the one after it.

    Args:
        key: Shape (B, S, heads, K) or (T, heads, K); queries if `reverse`.
        value: Shape (B, S, heads, V) or (T, heads, V); gradients of outputs if `reverse`.
        decay: Sums from `sum_decays` or `sum_channel_decays`; `None` for no decay.
        weight: Factors of keys from `sum_decays`; `None` for none.
        initial: State to start from, shape (sequences, N, K, V); `None` for zeros.
        final: Gets the state at the end, same shape.
        slots: The chunks.
        settings: How to launch.
        scale: Factor of `value`.
        reverse: Whether to walk from the last chunk to the first.
        inclusive: Whether a token reads a state with itself in it.

    Returns:
        Shape (slots, N, K, V), dtype of `value`.
    """
    sequences, N, K, V = final.shape
    states = value.new_empty((slots.count, N, K, V))
    if final.numel() == 0:
        return states
    key, key_stride, key_head = as_tokens(key)
    value, value_stride, value_head = as_tokens(value)
    blocks = ceil_div(K, settings.block_key) * ceil_div(V, settings.block_value)
    _states_kernel[(sequences * N * blocks,)](
        key,
        value,
        decay,
        weight,
        None if initial is None else initial.contiguous(),
        slots.cu_seqlens,
        slots.first,
        states,
        final,
        slots.S,
        slots.count,
        scale,
        key_stride,
        key_head,
        value_stride,
        value_head,
        N=N,
        K=K,
        V=V,
        KEY_GROUP=N // key.shape[-2],
        VALUE_GROUP=N // value.shape[-2],
        DECAY=kind_of_sums(decay),
        HAS_FACTOR=weight is not None,
        HAS_INITIAL=initial is not None,
        PACKED=slots.first is not None,
        REVERSE=reverse,
        INCLUSIVE=inclusive,
        PRECISION=precision_of(value.dtype),
        C=slots.chunk,
        BLOCK_K=settings.block_key,
        BLOCK_V=settings.block_value,
        num_warps=settings.num_warps,
        num_stages=settings.num_stages,
    )
    return states
