"""Recurrence of Elman in Triton: a program walks one head of a few sequences, weights on chip.

The backward walks the other way with the slopes that the forward kept and gives the gradients of
the sums in the nonlinearity; that of the weights is one product of matrices after it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from lme_kernels._triton_launch import thin_launch
from lme_kernels.custom_ops import define
from lme_kernels.ops.rnn._triton_scan import (
    as_tokens,
    bounds_of,
    load_matrix,
    load_steps,
    product,
    states_before,
    sum_heads,
    tanh,
    transposed,
    weight_gradient,
    why_not_scan,
)
from lme_kernels.ops.rnn.sequences import ScanOptions, num_sequences
from lme_kernels.ops.rnn.settings import block_of, reloads, scan_settings
from lme_kernels.tuning import ceil_div


def why_not(x: Tensor, weight: Tensor, initial_state: Tensor | None) -> str | None:
    return why_not_scan(x.shape[-1], x, weight, initial_state)


def rnn(
    x: Tensor,
    weight: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    nonlinearity: str,
    options: ScanOptions,
) -> tuple[Tensor, Tensor]:
    clip = options.gradient_clipping
    return _RNN.apply(x, weight, initial_state, cu_seqlens, nonlinearity, clip)


class _RNN(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, initial, cu_seqlens, nonlinearity, clip):
        keep = any(ctx.needs_input_grad)
        y, slope, final = _forward(x, weight, initial, cu_seqlens, nonlinearity, keep)
        # Nothing but its shape is asked of `x`.
        ctx.save_for_backward(y, slope, weight, initial, cu_seqlens)
        ctx.heads, ctx.clip = x.shape[-2], clip
        ctx.set_materialize_grads(False)
        return y, final

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y, grad_final):
        y, slope, weight, initial, cu_seqlens = ctx.saved_tensors
        grad_x, grad_weight, grad_initial = _backward(
            y, grad_y, grad_final, slope, weight, initial, cu_seqlens, ctx.heads, ctx.clip
        )
        return grad_x, grad_weight, None if initial is None else grad_initial, None, None, None


@thin_launch
@triton.jit(do_not_specialize=["S", "sequences"])
def _forward_kernel(
    x_ptr,
    weight_ptr,
    initial_ptr,
    cu_ptr,
    y_ptr,
    slope_ptr,
    final_ptr,
    S,
    sequences,
    token_stride,
    head_stride,
    N: tl.constexpr,
    D: tl.constexpr,
    X_GROUP: tl.constexpr,
    WEIGHT_GROUP: tl.constexpr,
    RELU: tl.constexpr,
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
    stored = load_matrix(weight_ptr, head // WEIGHT_GROUP, D, BLOCK_D, DOT)
    own = (sequence * N + head) * D + channel
    state = tl.zeros((BLOCK_D, BLOCK_B), dtype=tl.float32)
    if HAS_INITIAL:
        state = tl.load(initial_ptr + own, mask=mask, other=0.0).to(tl.float32)
    x_ptrs = x_ptr + start * token_stride + (head // X_GROUP).to(tl.int64) * head_stride
    result = (start * N + head) * D
    zero = tl.zeros((1, 1), dtype=tl.int32)
    ahead = load_steps(x_ptrs, channel, mask, zero, length, token_stride, AHEAD)
    for t in range(0, steps, AHEAD):
        here = ahead
        ahead = load_steps(x_ptrs, channel, mask, zero + t + AHEAD, length, token_stride, AHEAD)
        for u in tl.static_range(AHEAD):
            weight = stored
            if RELOAD:
                weight = load_matrix(weight_ptr, head // WEIGHT_GROUP, D, BLOCK_D, DOT)
            step = zero + t + u
            live = step < length
            new = product(weight, state, DOT) + here[u].to(tl.float32)
            new = tl.maximum(new, 0.0) if RELU else tanh(new, EXACT)
            state = tl.where(live, new, state)
            offset = result + step.to(tl.int64) * (N * D)
            tl.store(y_ptr + offset + channel, state, mask=mask & live)
            if SAVE:
                tl.store(slope_ptr + offset + channel, 1.0 - state * state, mask=mask & live)
    tl.store(final_ptr + own, state, mask=mask)


@thin_launch
@triton.jit(do_not_specialize=["S", "sequences"])
def _backward_kernel(
    grad_y_ptr,
    grad_final_ptr,
    slope_ptr,
    weight_ptr,
    cu_ptr,
    delta_ptr,
    grad_initial_ptr,
    S,
    sequences,
    clip,
    N: tl.constexpr,
    D: tl.constexpr,
    WEIGHT_GROUP: tl.constexpr,
    RELU: tl.constexpr,
    CLIP: tl.constexpr,
    HAS_GRAD_Y: tl.constexpr,
    HAS_GRAD_FINAL: tl.constexpr,
    PACKED: tl.constexpr,
    DOT: tl.constexpr,
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
    stored = load_matrix(weight_ptr, head // WEIGHT_GROUP, D, BLOCK_D, DOT)
    own = (sequence * N + head) * D + channel
    grad = tl.zeros((BLOCK_D, BLOCK_B), dtype=tl.float32)
    if HAS_GRAD_FINAL:
        grad = tl.load(grad_final_ptr + own, mask=mask, other=0.0).to(tl.float32)
    # Step 0 is the last token of each sequence.
    last = ((start + length - 1) * N + head) * D
    zero = tl.zeros((1, 1), dtype=tl.int32)
    slopes = load_steps(slope_ptr + last, channel, mask, zero, length, -N * D, AHEAD)
    grads = slopes
    if HAS_GRAD_Y:
        grads = load_steps(grad_y_ptr + last, channel, mask, zero, length, -N * D, AHEAD)
    for t in range(0, steps, AHEAD):
        slopes_here, grads_here = slopes, grads
        slopes = load_steps(
            slope_ptr + last, channel, mask, zero + t + AHEAD, length, -N * D, AHEAD
        )
        if HAS_GRAD_Y:
            grads = load_steps(
                grad_y_ptr + last, channel, mask, zero + t + AHEAD, length, -N * D, AHEAD
            )
        for u in tl.static_range(AHEAD):
            weight = stored
            if RELOAD:
                weight = load_matrix(weight_ptr, head // WEIGHT_GROUP, D, BLOCK_D, DOT)
            step = zero + t + u
            live = step < length
            delta = grad
            if HAS_GRAD_Y:
                delta += grads_here[u].to(tl.float32)
            if CLIP:
                delta = tl.minimum(tl.maximum(delta, -clip), clip)
            slope = slopes_here[u].to(tl.float32)
            if RELU:
                delta = tl.where(slope > 0.0, delta, 0.0)
            else:
                delta *= slope
            offset = last - step.to(tl.int64) * (N * D)
            tl.store(delta_ptr + offset + channel, delta, mask=mask & live)
            grad = tl.where(live, product(weight, delta, DOT), grad)
    tl.store(grad_initial_ptr + own, grad, mask=mask)


def _forward_fake(x, weight, initial, cu_seqlens, nonlinearity, keep):
    N = max(x.shape[-2], weight.shape[0])
    y = x.new_empty((*x.shape[:-2], N, x.shape[-1]))
    final = x if initial is None else initial
    state = (num_sequences(x, cu_seqlens), N, x.shape[-1])
    slope = x.new_empty(y.shape if keep and nonlinearity == "tanh" else (0,))
    return y, slope, final.new_empty(state)


@define(
    "rnn_forward(Tensor x, Tensor weight, Tensor? initial, Tensor? cu_seqlens, str nonlinearity, "
    "bool keep) -> (Tensor, Tensor, Tensor)",
    _forward_fake,
)
def _forward(x, weight, initial, cu_seqlens, nonlinearity, keep):
    y, slope, final = _forward_fake(x, weight, initial, cu_seqlens, nonlinearity, keep)
    sequences, N, D = final.shape
    if sequences == 0:
        return y, slope, final
    x, token_stride, head_stride = as_tokens(x)
    settings = scan_settings("rnn.forward", 1, D, x.dtype, sequences, N)
    _forward_kernel[(ceil_div(sequences, settings.block_sequences), N)](
        x,
        transposed(weight),
        None if initial is None else initial.contiguous(),
        None if cu_seqlens is None else cu_seqlens.contiguous(),
        y,
        slope,
        final,
        y.shape[-3],
        sequences,
        token_stride,
        head_stride,
        N=N,
        D=D,
        X_GROUP=N // x.shape[-2],
        WEIGHT_GROUP=N // weight.shape[0],
        RELU=nonlinearity == "relu",
        SAVE=slope.numel() > 0,
        HAS_INITIAL=initial is not None,
        PACKED=cu_seqlens is not None,
        DOT=settings.dot,
        EXACT=x.dtype == torch.float32,
        RELOAD=reloads(settings, 1, D),
        AHEAD=settings.ahead,
        BLOCK_B=settings.block_sequences,
        BLOCK_D=block_of(D),
        num_warps=settings.num_warps,
        num_stages=1,
    )
    return y, slope, final


def _backward_fake(y, grad_y, grad_final, slope, weight, initial, cu_seqlens, heads, clip):
    state = (num_sequences(y, cu_seqlens), *y.shape[-2:])
    grad_initial = y.new_empty(0) if initial is None else initial.new_empty(state)
    grad_x = y.new_empty((*y.shape[:-2], heads, y.shape[-1]))
    return grad_x, weight.new_empty(weight.shape), grad_initial


@define(
    "rnn_backward(Tensor y, Tensor? grad_y, Tensor? grad_final, Tensor slope, Tensor weight, "
    "Tensor? initial, Tensor? cu_seqlens, int heads, float? clip) -> (Tensor, Tensor, Tensor)",
    _backward_fake,
)
def _backward(y, grad_y, grad_final, slope, weight, initial, cu_seqlens, heads, clip):
    N, D = y.shape[-2:]
    sequences = num_sequences(y, cu_seqlens)
    delta = torch.empty_like(y)
    state = (sequences, N, D)
    grad_initial = (y if initial is None else initial).new_empty(state)
    initial = None if initial is None else initial.contiguous()
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.contiguous()
    if sequences > 0:
        settings = scan_settings("rnn.backward", 1, D, y.dtype, sequences, N)
        relu = slope.numel() == 0
        _backward_kernel[(ceil_div(sequences, settings.block_sequences), N)](
            None if grad_y is None else grad_y.contiguous(),
            None if grad_final is None else grad_final.contiguous(),
            y if relu else slope,
            weight.contiguous(),
            cu_seqlens,
            delta,
            grad_initial,
            y.shape[-3],
            sequences,
            0.0 if clip is None else clip,
            N=N,
            D=D,
            WEIGHT_GROUP=N // weight.shape[0],
            RELU=relu,
            CLIP=clip is not None,
            HAS_GRAD_Y=grad_y is not None,
            HAS_GRAD_FINAL=grad_final is not None,
            PACKED=cu_seqlens is not None,
            DOT=settings.dot,
            RELOAD=reloads(settings, 1, D),
            AHEAD=settings.ahead,
            BLOCK_B=settings.block_sequences,
            BLOCK_D=block_of(D),
            num_warps=settings.num_warps,
            num_stages=1,
        )
    flat = delta.reshape(-1, N, D)
    grad_weight = weight_gradient(states_before(y, initial, cu_seqlens), flat, weight)
    grad_x = sum_heads(delta, y.new_empty((*y.shape[:-2], heads, D)))
    absent = y.new_empty(0)
    return grad_x, grad_weight, absent if initial is None else grad_initial
