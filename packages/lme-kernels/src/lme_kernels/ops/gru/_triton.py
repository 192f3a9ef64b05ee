"""Gated recurrent unit in Triton: a program walks one head of a few sequences, weights on chip.

The forward keeps what its nonlinearities were applied to, rounded to the dtype of the inputs, which
tells their slopes more exactly than rounded results would. The backward gives the gradients of
those sums; those of the weights are products of matrices after it.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lme_kernels.custom_ops import define
from lme_kernels.ops.gru._triton_kernels import backward_kernel, forward_kernel
from lme_kernels.ops.rnn._triton_scan import (
    as_tokens,
    states_before,
    sum_heads,
    transposed,
    weight_gradient,
    why_not_scan,
)
from lme_kernels.ops.rnn.sequences import ScanOptions, num_sequences
from lme_kernels.ops.rnn.settings import block_of, reloads, scan_settings
from lme_kernels.tuning import ceil_div


def why_not(x: Tensor, *others: Tensor | None) -> str | None:
    return why_not_scan(x.shape[-1], x, *others)


def gru(
    x: Tensor,
    weight: Tensor,
    forget_input: Tensor,
    forget_weight: Tensor,
    reset_input: Tensor,
    reset_weight: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    options: ScanOptions,
) -> tuple[Tensor, Tensor]:
    return _GRU.apply(
        x,
        weight,
        forget_input,
        forget_weight,
        reset_input,
        reset_weight,
        initial_state,
        cu_seqlens,
        options.gradient_clipping,
    )


class _GRU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, forget_x, forget_weight, reset_x, reset_weight, initial, cu, clip):
        inputs, weights = (x, forget_x, reset_x), (weight, forget_weight, reset_weight)
        keep = any(ctx.needs_input_grad)
        y, kept, final = _forward(
            x, weight, forget_x, forget_weight, reset_x, reset_weight, initial, cu, keep
        )
        ctx.save_for_backward(y, kept, *weights, initial, cu)
        ctx.heads, ctx.clip = [each.shape[-2] for each in inputs], clip
        ctx.set_materialize_grads(False)
        return y, final

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y, grad_final):
        y, kept, *weights, initial, cu_seqlens = ctx.saved_tensors
        *gradients, grad_initial = _backward(
            y, grad_y, grad_final, kept, *weights, initial, cu_seqlens, ctx.heads, ctx.clip
        )
        return *gradients, None if initial is None else grad_initial, None, None


def _forward_fake(x, weight, forget_x, forget_weight, reset_x, reset_weight, initial, cu, keep):
    heads = [each.shape[-2] for each in (x, forget_x, reset_x)]
    N = max(*heads, *(each.shape[0] for each in (weight, forget_weight, reset_weight)))
    y = x.new_empty((*x.shape[:-2], N, x.shape[-1]))
    # Sums in front of the gates have few bits before the point: float16 keeps three more after it,
    # and where it overflows the gates are saturated anyway.
    dtype = torch.float16 if x.dtype == torch.bfloat16 else x.dtype
    kept = x.new_empty((3, *y.shape) if keep else (0,), dtype=dtype)
    final = (x if initial is None else initial).new_empty((num_sequences(x, cu), N, x.shape[-1]))
    return y, kept, final


@define(
    "gru_forward(Tensor x, Tensor weight, Tensor forget_x, Tensor forget_weight, Tensor reset_x, "
    "Tensor reset_weight, Tensor? initial, Tensor? cu_seqlens, bool keep) "
    "-> (Tensor, Tensor, Tensor)",
    _forward_fake,
)
def _forward(x, weight, forget_x, forget_weight, reset_x, reset_weight, initial, cu, keep):
    y, kept, final = _forward_fake(
        x, weight, forget_x, forget_weight, reset_x, reset_weight, initial, cu, keep
    )
    sequences, N, D = final.shape
    if sequences == 0:
        return y, kept, final
    settings = scan_settings("gru.forward", 3, D, x.dtype, sequences, N)
    x, x_token, x_head = as_tokens(x)
    forget_x, forget_token, forget_head = as_tokens(forget_x)
    reset_x, reset_token, reset_head = as_tokens(reset_x)
    forward_kernel[(ceil_div(sequences, settings.block_sequences), N)](
        x,
        forget_x,
        reset_x,
        transposed(weight),
        transposed(forget_weight),
        transposed(reset_weight),
        None if initial is None else initial.contiguous(),
        None if cu is None else cu.contiguous(),
        y,
        kept,
        final,
        y.shape[-3],
        sequences,
        y.numel(),
        x_token,
        x_head,
        forget_token,
        forget_head,
        reset_token,
        reset_head,
        N=N,
        D=D,
        X_GROUP=N // x.shape[-2],
        FORGET_GROUP=N // forget_x.shape[-2],
        RESET_GROUP=N // reset_x.shape[-2],
        WEIGHT_GROUP=N // weight.shape[0],
        FORGET_WEIGHT_GROUP=N // forget_weight.shape[0],
        RESET_WEIGHT_GROUP=N // reset_weight.shape[0],
        SAVE=keep,
        HAS_INITIAL=initial is not None,
        PACKED=cu is not None,
        DOT=settings.dot,
        EXACT=x.dtype == torch.float32,
        RELOAD=reloads(settings, 3, D),
        AHEAD=settings.ahead,
        BLOCK_B=settings.block_sequences,
        BLOCK_D=block_of(D),
        num_warps=settings.num_warps,
        num_stages=1,
    )
    return y, kept, final


def _backward_fake(y, grad_y, grad_final, kept, *rest):
    *weights, initial, cu_seqlens, heads, _ = rest
    state = (num_sequences(y, cu_seqlens), *y.shape[-2:])
    grad_initial = y.new_empty(0) if initial is None else initial.new_empty(state)
    pairs = zip(heads, weights, strict=True)
    shapes = [((*y.shape[:-2], each, y.shape[-1]), weight.shape) for each, weight in pairs]
    return *(y.new_empty(shape) for pair in shapes for shape in pair), grad_initial


@define(
    "gru_backward(Tensor y, Tensor? grad_y, Tensor? grad_final, Tensor kept, Tensor weight, "
    "Tensor forget_weight, Tensor reset_weight, Tensor? initial, Tensor? cu_seqlens, int[] heads, "
    "float? clip) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward_fake,
)
def _backward(y, grad_y, grad_final, kept, *rest):
    *weights, initial, cu_seqlens, heads, clip = rest
    N, D = y.shape[-2:]
    sequences = num_sequences(y, cu_seqlens)
    initial = None if initial is None else initial.contiguous()
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.contiguous()
    before = states_before(y, initial, cu_seqlens)
    deltas = [torch.empty_like(y) for _ in weights]
    reset_before = torch.empty_like(before)
    grad_initial = (y if initial is None else initial).new_empty((sequences, N, D))
    if sequences > 0:
        settings = scan_settings("gru.backward", 3, D, y.dtype, sequences, N)
        backward_kernel[(ceil_div(sequences, settings.block_sequences), N)](
            None if grad_y is None else grad_y.contiguous(),
            None if grad_final is None else grad_final.contiguous(),
            kept,
            before,
            *(each.contiguous() for each in weights),
            cu_seqlens,
            *deltas,
            reset_before,
            grad_initial,
            y.shape[-3],
            sequences,
            y.numel(),
            0.0 if clip is None else clip,
            N=N,
            D=D,
            WEIGHT_GROUP=N // weights[0].shape[0],
            FORGET_WEIGHT_GROUP=N // weights[1].shape[0],
            RESET_WEIGHT_GROUP=N // weights[2].shape[0],
            CLIP=clip is not None,
            HAS_GRAD_Y=grad_y is not None,
            HAS_GRAD_FINAL=grad_final is not None,
            PACKED=cu_seqlens is not None,
            DOT=settings.dot,
            EXACT=y.dtype == torch.float32,
            RELOAD=reloads(settings, 3, D),
            AHEAD=settings.ahead,
            BLOCK_B=settings.block_sequences,
            BLOCK_D=block_of(D),
            num_warps=settings.num_warps,
            num_stages=1,
        )
    gradients = []
    befores = (reset_before, before, before)
    for delta, weight, count, state in zip(deltas, weights, heads, befores, strict=True):
        gradients.append(sum_heads(delta, y.new_empty((*y.shape[:-2], count, D))))
        gradients.append(weight_gradient(state, delta.reshape(-1, N, D), weight))
    return *gradients, y.new_empty(0) if initial is None else grad_initial
