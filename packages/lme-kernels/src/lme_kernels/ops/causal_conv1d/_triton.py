"""Depthwise causal convolution in Triton: inputs are read once, the backward is one kernel."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lme_kernels._triton_rows import as_rows, sum_partials
from lme_kernels.custom_ops import define
from lme_kernels.device import why_not_triton
from lme_kernels.ops.causal_conv1d._triton_kernels import backward_kernel, forward_kernel
from lme_kernels.packing import position_ids, sequence_ids
from lme_kernels.tuning import ceil_div, next_power_of_two

MAX_TAPS = 16
# Tokens that a program walks, and whose rows it loads at once.
BLOCK_T, AHEAD = 128, 8


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
    return _CausalConv1d.apply(x, weight, bias, initial_state, position, owner, silu)


class _CausalConv1d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, initial, position, owner, silu):
        ctx.save_for_backward(x, weight, bias, initial, position, owner)
        ctx.silu = silu
        return _forward(x, weight, bias, initial, position, owner, silu)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):
        x, weight, bias, initial, position, owner = ctx.saved_tensors
        grad_x, grad_weight, grad_bias, grad_initial = _backward(
            grad_y, x, weight, bias, initial, position, owner, ctx.silu
        )
        grad_bias = None if bias is None else grad_bias
        grad_initial = None if initial is None else grad_initial
        return grad_x, grad_weight, grad_bias, grad_initial, None, None, None


def _tiles(T, C):
    """Grid and launch settings: 4 channels a thread, a stretch of tokens a program."""
    block_c = min(256, max(32, next_power_of_two(C)))
    block_t = min(BLOCK_T, max(AHEAD, next_power_of_two(T)))
    settings = {"AHEAD": AHEAD, "BLOCK_T": block_t, "BLOCK_C": block_c}
    settings["num_warps"] = max(1, block_c // 128)
    return (ceil_div(T, block_t), ceil_div(C, block_c)), settings


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
    grid, settings = _tiles(T, C)
    forward_kernel[grid](
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
        **settings,
    )
    return y


def _backward_fake(grad_y, x, weight, bias, initial, position, owner, silu):
    return (
        x.new_empty(x.shape),
        weight.new_empty(weight.shape),
        x.new_empty(0) if bias is None else bias.new_empty(bias.shape),
        x.new_empty(0) if initial is None else initial.new_empty(initial.shape),
    )


@define(
    "causal_conv1d_backward(Tensor grad_y, Tensor x, Tensor weight, Tensor? bias, "
    "Tensor? initial, Tensor? position, Tensor? owner, bool silu) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward_fake,
)
def _backward(grad_y, x, weight, bias, initial, position, owner, silu):
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
    first = None
    if initial is not None:
        first = torch.zeros(
            (initial.shape[0], W - 1, C), dtype=torch.float32, device=initial.device
        )
    grid, settings = _tiles(T, C)
    partials = torch.empty((grid[0], (W + 1) * C), dtype=torch.float32, device=x.device)
    backward_kernel[grid](
        grad_y,
        x,
        weight,
        bias,
        None if initial is None else initial.contiguous(),
        position,
        owner,
        grad_x,
        partials,
        first,
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
        **settings,
    )
    sums = sum_partials(partials, torch.float32).view(W + 1, C)
    grad_weight = sums[:W].mT.to(weight.dtype).contiguous()
    return (
        grad_x,
        grad_weight,
        x.new_empty(0) if bias is None else sums[W].to(bias.dtype, copy=True),
        x.new_empty(0) if initial is None else _initial(first, weight, initial),
    )


def _initial(first, weight, initial):
    """Gradient of the state before each sequence, from those of the sums of its first tokens."""
    W = weight.shape[1]
    grad = torch.zeros(initial.shape, dtype=torch.float32, device=initial.device)
    taps = weight.float()
    for place in range(W - 1):
        for later in range(place + 1):
            grad[..., place] += taps[:, place - later] * first[:, later]
    return grad.to(initial.dtype)
