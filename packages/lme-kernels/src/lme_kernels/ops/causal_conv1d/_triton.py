"""Depthwise causal convolution in Triton: a program computes a tile of tokens and channels.

The earlier inputs of a tile are loaded again for each tap, from the cache. The backward computes
the gradient before the activation with the taps' partial gradients, then convolves it backwards.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from lme_kernels._triton_rows import as_rows, sum_partials
from lme_kernels.custom_ops import define
from lme_kernels.device import why_not_triton
from lme_kernels.packing import position_ids, sequence_ids
from lme_kernels.tuning import ceil_div, next_power_of_two

MAX_TAPS = 16


def why_not(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None
) -> str | None:
    if weight.shape[1] > MAX_TAPS:
        return f"there are {weight.shape[1]} taps, and it takes at most {MAX_TAPS}"
    return why_not_triton(x, weight, bias, initial_state)


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
) -> Tensor:
    position = owner = None
    if cu_seqlens is not None:
        position = position_ids(cu_seqlens, x.shape[0]).int()
        if initial_state is not None:
            owner = sequence_ids(cu_seqlens, x.shape[0])
    return _CausalConv1d.apply(x, weight, bias, initial_state, position, owner, cu_seqlens, silu)


class _CausalConv1d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, initial, position, owner, cu_seqlens, silu):
        ctx.save_for_backward(x, weight, bias, initial, position, owner, cu_seqlens)
        ctx.silu = silu
        return _forward(x, weight, bias, initial, position, owner, silu)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):
        x, weight, bias, initial, position, owner, cu_seqlens = ctx.saved_tensors
        grad_x, grad_weight, grad_bias, grad_initial = _backward(
            grad_y, x, weight, bias, initial, position, owner, cu_seqlens, ctx.silu
        )
        grad_bias = None if bias is None else grad_bias
        grad_initial = None if initial is None else grad_initial
        return grad_x, grad_weight, grad_bias, grad_initial, None, None, None, None


@triton.jit
def _positions(position_ptr, owner_ptr, token, T, S, PACKED: tl.constexpr, OWNED: tl.constexpr):
    """Place of each token in its sequence, and the sequence if there is a state before it."""
    owner = token // S
    position = token - owner * S
    if PACKED:
        position = tl.load(position_ptr + token, mask=token < T, other=0).to(tl.int64)
        if OWNED:
            owner = tl.load(owner_ptr + token, mask=token < T, other=0)
    return position, owner


@triton.jit
def _earlier(
    x_ptr,
    initial_ptr,
    token,
    position,
    owner,
    channel,
    mask,
    x_stride,
    C,
    D: tl.constexpr,
    W: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
):
    """Load the inputs `D` tokens before, those before the first from the state, in float32."""
    offset = (token - D) * x_stride + channel
    x = tl.load(x_ptr + offset, mask=mask & (position >= D), other=0.0).to(tl.float32)
    if HAS_INITIAL and D > 0:
        offset = (owner * C + channel) * (W - 1) + W - 1 + position - D
        x += tl.load(initial_ptr + offset, mask=mask & (position < D), other=0.0).to(tl.float32)
    return x


@triton.jit
def _sums(
    x_ptr,
    weight_ptr,
    bias_ptr,
    initial_ptr,
    token,
    position,
    owner,
    channel,
    mask,
    x_stride,
    C,
    W: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    z = tl.zeros((BLOCK_T, BLOCK_C), dtype=tl.float32)
    for d in tl.static_range(W):
        x = _earlier(
            x_ptr, initial_ptr, token, position, owner, channel, mask, x_stride, C, d, W,
            HAS_INITIAL,
        )  # fmt: skip
        tap = tl.load(weight_ptr + channel * W + W - 1 - d, mask=channel < C, other=0.0)
        z += x * tap.to(tl.float32)
    if HAS_BIAS:
        z += tl.load(bias_ptr + channel, mask=channel < C, other=0.0).to(tl.float32)
    return z


@triton.jit
def _forward_kernel(
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
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    mask = (token < T) & (channel < C)
    position, owner = _positions(position_ptr, owner_ptr, token, T, S, PACKED, HAS_INITIAL)
    z = _sums(
        x_ptr, weight_ptr, bias_ptr, initial_ptr, token, position, owner, channel, mask, x_stride,
        C, W, HAS_BIAS, HAS_INITIAL, BLOCK_T, BLOCK_C,
    )  # fmt: skip
    if SILU:
        z = z / (1.0 + tl.exp(-z))
    tl.store(y_ptr + token * C + channel, z, mask=mask)


@triton.jit
def _sums_backward_kernel(
    grad_y_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    initial_ptr,
    position_ptr,
    owner_ptr,
    grad_z_ptr,
    partial_ptr,
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
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    mask = (token < T) & (channel < C)
    position, owner = _positions(position_ptr, owner_ptr, token, T, S, PACKED, HAS_INITIAL)
    grad = tl.load(grad_y_ptr + token * grad_y_stride + channel, mask=mask, other=0.0)
    grad = grad.to(tl.float32)
    if SILU:
        z = _sums(
            x_ptr, weight_ptr, bias_ptr, initial_ptr, token, position, owner, channel, mask,
            x_stride, C, W, HAS_BIAS, HAS_INITIAL, BLOCK_T, BLOCK_C,
        )  # fmt: skip
        sigmoid = 1.0 / (1.0 + tl.exp(-z))
        grad *= sigmoid * (1.0 + z * (1.0 - sigmoid))
        tl.store(grad_z_ptr + token * C + channel, grad, mask=mask)
    # One row of partial gradients a program: W taps, then the bias.
    row = partial_ptr + tl.program_id(0).to(tl.int64) * (W + 1) * C
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    for d in tl.static_range(W):
        x = _earlier(
            x_ptr, initial_ptr, token, position, owner, channel, mask, x_stride, C, d, W,
            HAS_INITIAL,
        )  # fmt: skip
        tl.store(row + (W - 1 - d) * C + column, tl.sum(grad * x, axis=0), mask=column < C)
    tl.store(row + W * C + column, tl.sum(grad, axis=0), mask=column < C)


@triton.jit
def _inputs_backward_kernel(
    grad_z_ptr,
    weight_ptr,
    position_ptr,
    grad_x_ptr,
    grad_z_stride,
    T,
    S,
    C,
    W: tl.constexpr,
    PACKED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    grad_x = tl.zeros((BLOCK_T, BLOCK_C), dtype=tl.float32)
    for d in tl.static_range(W):
        later = token + d
        if PACKED:
            # A token reaches the one `d` after it if that has as many before it in its sequence.
            same = tl.load(position_ptr + later, mask=later < T, other=-1) >= d
        else:
            same = (later < T) & (later % S >= d)
        offset = later * grad_z_stride + channel
        grad = tl.load(grad_z_ptr + offset, mask=same & (channel < C), other=0.0)
        tap = tl.load(weight_ptr + channel * W + W - 1 - d, mask=channel < C, other=0.0)
        grad_x += grad.to(tl.float32) * tap.to(tl.float32)
    mask = (token < T) & (channel < C)
    tl.store(grad_x_ptr + token * C + channel, grad_x, mask=mask)


def _tiles(T, C, block_t, block_c):
    block_c = min(block_c, max(16, next_power_of_two(C)))
    return (ceil_div(T, block_t), ceil_div(C, block_c)), {"BLOCK_T": block_t, "BLOCK_C": block_c}


def _forward_fake(x, weight, bias, initial, position, owner, silu):
    return x.new_empty(x.shape)


@define(
    "causal_conv1d_forward(Tensor x, Tensor weight, Tensor? bias, Tensor? initial, "
    "Tensor? position, Tensor? owner, bool silu) -> Tensor",
    _forward_fake,
)
def _forward(x, weight, bias, initial, position, owner, silu):
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    x, x_stride = as_rows(x)
    T, C = x.numel() // x.shape[-1], x.shape[-1]
    grid, blocks = _tiles(T, C, 16, 256)
    _forward_kernel[grid](
        x,
        weight.contiguous(),
        bias,
        None if initial is None else initial.contiguous(),
        position,
        owner,
        y,
        x_stride,
        T,
        x.shape[-2],
        C,
        W=weight.shape[1],
        SILU=silu,
        HAS_BIAS=bias is not None,
        HAS_INITIAL=initial is not None,
        PACKED=position is not None,
        num_warps=4,
        **blocks,
    )
    return y


def _backward_fake(grad_y, x, weight, bias, initial, position, owner, cu_seqlens, silu):
    return (
        x.new_empty(x.shape),
        weight.new_empty(weight.shape),
        x.new_empty(0) if bias is None else bias.new_empty(bias.shape),
        x.new_empty(0) if initial is None else initial.new_empty(initial.shape),
    )


@define(
    "causal_conv1d_backward(Tensor grad_y, Tensor x, Tensor weight, Tensor? bias, "
    "Tensor? initial, Tensor? position, Tensor? owner, Tensor? cu_seqlens, bool silu) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _backward_fake,
)
def _backward(grad_y, x, weight, bias, initial, position, owner, cu_seqlens, silu):
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if grad_x.numel() == 0:
        return (
            grad_x,
            weight.new_zeros(weight.shape),
            x.new_empty(0) if bias is None else bias.new_zeros(bias.shape),
            x.new_empty(0) if initial is None else initial.new_zeros(initial.shape),
        )
    x, x_stride = as_rows(x)
    grad_y, grad_y_stride = as_rows(grad_y)
    weight = weight.contiguous()
    T, S, C, W = x.numel() // x.shape[-1], x.shape[-2], x.shape[-1], weight.shape[1]
    grad_z = torch.empty(x.shape, dtype=x.dtype, device=x.device) if silu else grad_y
    grid, blocks = _tiles(T, C, 128, 64)
    partials = torch.empty((grid[0], (W + 1) * C), dtype=torch.float32, device=x.device)
    _sums_backward_kernel[grid](
        grad_y,
        x,
        weight,
        bias,
        None if initial is None else initial.contiguous(),
        position,
        owner,
        grad_z,
        partials,
        grad_y_stride,
        x_stride,
        T,
        S,
        C,
        W=W,
        SILU=silu,
        HAS_BIAS=bias is not None,
        HAS_INITIAL=initial is not None,
        PACKED=position is not None,
        num_warps=8,
        **blocks,
    )
    grid, blocks = _tiles(T, C, 16, 256)
    grad_z_stride = C if silu else grad_y_stride
    _inputs_backward_kernel[grid](
        grad_z,
        weight,
        position,
        grad_x,
        grad_z_stride,
        T,
        S,
        C,
        W=W,
        PACKED=position is not None,
        num_warps=4,
        **blocks,
    )
    sums = sum_partials(partials, torch.float32).view(W + 1, C)
    grad_weight = sums[:W].mT.to(weight.dtype).contiguous()
    return (
        grad_x,
        grad_weight,
        x.new_empty(0) if bias is None else sums[W].to(bias.dtype, copy=True),
        x.new_empty(0) if initial is None else _initial(grad_z, weight, initial, cu_seqlens),
    )


def _initial(grad_z, weight, initial, cu_seqlens):
    """Gradient of the state before each sequence, from the first W - 1 tokens."""
    W = weight.shape[1]
    column = torch.arange(W - 1, device=grad_z.device)
    if cu_seqlens is None:
        first = grad_z.new_zeros((grad_z.shape[0], W - 1, grad_z.shape[2]), dtype=torch.float32)
        first[:, : grad_z.shape[1]] += grad_z[:, : W - 1]
    else:
        start, end = cu_seqlens[:-1].long().unsqueeze(-1), cu_seqlens[1:].long().unsqueeze(-1)
        token = start + column
        taken = grad_z[token.clamp(max=grad_z.shape[0] - 1)].float()
        first = torch.where((token < end).unsqueeze(-1), taken, 0.0)
    grad = torch.zeros(initial.shape, dtype=torch.float32, device=grad_z.device)
    taps = weight.float()
    for place in range(W - 1):
        for later in range(place + 1):
            grad[..., place] += taps[:, place - later] * first[:, later]
    return grad.to(initial.dtype)
