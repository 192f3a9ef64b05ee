"""Long short-term memory in Triton: a program walks one head of a few sequences, weights on chip.

The forward keeps what its nonlinearities were applied to and the cells, rounded to the dtype of the
inputs. The backward gives the gradients of those sums; those of the weights are products of
matrices after it.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lme_kernels.custom_ops import define
from lme_kernels.ops.lstm._triton_kernels import backward_kernel, forward_kernel
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


def lstm(
    x: Tensor,
    weight: Tensor,
    forget_input: Tensor,
    forget_weight: Tensor,
    input_input: Tensor,
    input_weight: Tensor,
    output_input: Tensor,
    output_weight: Tensor,
    initial_state: Tensor | None,
    initial_cell: Tensor | None,
    cu_seqlens: Tensor | None,
    options: ScanOptions,
) -> tuple[Tensor, Tensor, Tensor]:
    return _LSTM.apply(
        x,
        weight,
        forget_input,
        forget_weight,
        input_input,
        input_weight,
        output_input,
        output_weight,
        initial_state,
        initial_cell,
        cu_seqlens,
        options.gradient_clipping,
    )


class _LSTM(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *args):
        *pairs, initial, initial_cell, cu_seqlens, clip = args
        keep = any(ctx.needs_input_grad)
        y, kept, final, final_cell = _forward(*pairs, initial, initial_cell, cu_seqlens, keep)
        ctx.save_for_backward(y, kept, *pairs[1::2], initial, initial_cell, cu_seqlens)
        ctx.heads, ctx.clip = [each.shape[-2] for each in pairs[::2]], clip
        ctx.set_materialize_grads(False)
        return y, final, final_cell

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        y, *saved = ctx.saved_tensors
        *gradients, grad_initial, grad_cell = _backward(y, *grads, *saved, ctx.heads, ctx.clip)
        initial, initial_cell = saved[-3:-1]
        return (
            *gradients,
            None if initial is None else grad_initial,
            None if initial_cell is None else grad_cell,
            None,
            None,
        )


def _forward_fake(*args):
    *pairs, initial, initial_cell, cu_seqlens, keep = args
    x = pairs[0]
    N = max(*(each.shape[-2] for each in pairs[::2]), *(each.shape[0] for each in pairs[1::2]))
    y = x.new_empty((*x.shape[:-2], N, x.shape[-1]))
    kept = x.new_empty((5, *y.shape) if keep else (0,))
    state = (num_sequences(x, cu_seqlens), N, x.shape[-1])
    finals = ((x if each is None else each).new_empty(state) for each in (initial, initial_cell))
    return y, kept, *finals


@define(
    "lstm_forward(Tensor x, Tensor weight, Tensor forget_x, Tensor forget_weight, Tensor input_x, "
    "Tensor input_weight, Tensor output_x, Tensor output_weight, Tensor? initial, "
    "Tensor? initial_cell, Tensor? cu_seqlens, bool keep) -> (Tensor, Tensor, Tensor, Tensor)",
    _forward_fake,
)
def _forward(*args):
    *pairs, initial, initial_cell, cu_seqlens, keep = args
    y, kept, final, final_cell = _forward_fake(*args)
    sequences, N, D = final.shape
    if sequences == 0:
        return y, kept, final, final_cell
    settings = scan_settings("lstm.forward", 4, D, y.dtype, sequences, N)
    inputs = [as_tokens(each) for each in pairs[::2]]
    weights = pairs[1::2]
    groups = [N // each[0].shape[-2] for each in inputs]
    weight_groups = [N // each.shape[0] for each in weights]
    forward_kernel[(ceil_div(sequences, settings.block_sequences), N)](
        *(each[0] for each in inputs),
        *(transposed(each) for each in weights),
        None if initial is None else initial.contiguous(),
        None if initial_cell is None else initial_cell.contiguous(),
        None if cu_seqlens is None else cu_seqlens.contiguous(),
        y,
        kept,
        final,
        final_cell,
        y.shape[-3],
        sequences,
        y.numel(),
        *(stride for each in inputs for stride in each[1:]),
        N=N,
        D=D,
        X_GROUP=groups[0],
        FORGET_GROUP=groups[1],
        INPUT_GROUP=groups[2],
        OUTPUT_GROUP=groups[3],
        WEIGHT_GROUP=weight_groups[0],
        FORGET_WEIGHT_GROUP=weight_groups[1],
        INPUT_WEIGHT_GROUP=weight_groups[2],
        OUTPUT_WEIGHT_GROUP=weight_groups[3],
        SAVE=keep,
        HAS_INITIAL=initial is not None,
        HAS_INITIAL_CELL=initial_cell is not None,
        PACKED=cu_seqlens is not None,
        DOT=settings.dot,
        EXACT=y.dtype == torch.float32,
        RELOAD=reloads(settings, 4, D),
        AHEAD=settings.ahead,
        BLOCK_B=settings.block_sequences,
        BLOCK_D=block_of(D),
        num_warps=settings.num_warps,
        num_stages=1,
    )
    return y, kept, final, final_cell


def _backward_fake(y, grad_y, grad_final, grad_final_cell, kept, *rest):
    *weights, initial, initial_cell, cu_seqlens, heads, _ = rest
    state = (num_sequences(y, cu_seqlens), *y.shape[-2:])
    pairs = zip(heads, weights, strict=True)
    shapes = [((*y.shape[:-2], each, y.shape[-1]), weight.shape) for each, weight in pairs]
    states = (
        y.new_empty(0) if each is None else each.new_empty(state)
        for each in (initial, initial_cell)
    )
    return *(y.new_empty(shape) for pair in shapes for shape in pair), *states


@define(
    "lstm_backward(Tensor y, Tensor? grad_y, Tensor? grad_final, Tensor? grad_final_cell, "
    "Tensor kept, Tensor weight, Tensor forget_weight, Tensor input_weight, Tensor output_weight, "
    "Tensor? initial, Tensor? initial_cell, Tensor? cu_seqlens, int[] heads, float? clip) "
    f"-> ({', '.join(['Tensor'] * 10)})",
    _backward_fake,
)
def _backward(y, grad_y, grad_final, grad_final_cell, kept, *rest):
    *weights, initial, initial_cell, cu_seqlens, heads, clip = rest
    N, D = y.shape[-2:]
    sequences = num_sequences(y, cu_seqlens)
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.contiguous()
    deltas = [torch.empty_like(y) for _ in weights]
    grad_states = [
        (y if each is None else each).new_empty((sequences, N, D))
        for each in (initial, initial_cell)
    ]
    if sequences > 0:
        settings = scan_settings("lstm.backward", 4, D, y.dtype, sequences, N)
        groups = [N // each.shape[0] for each in weights]
        grads = (grad_y, grad_final, grad_final_cell)
        backward_kernel[(ceil_div(sequences, settings.block_sequences), N)](
            *(None if each is None else each.contiguous() for each in grads),
            kept,
            *(each.contiguous() for each in weights),
            cu_seqlens,
            *deltas,
            *grad_states,
            y.shape[-3],
            sequences,
            y.numel(),
            0.0 if clip is None else clip,
            N=N,
            D=D,
            WEIGHT_GROUP=groups[0],
            FORGET_WEIGHT_GROUP=groups[1],
            INPUT_WEIGHT_GROUP=groups[2],
            OUTPUT_WEIGHT_GROUP=groups[3],
            CLIP=clip is not None,
            HAS_GRAD_Y=grad_y is not None,
            HAS_GRAD_FINAL=grad_final is not None,
            HAS_GRAD_FINAL_CELL=grad_final_cell is not None,
            PACKED=cu_seqlens is not None,
            DOT=settings.dot,
            EXACT=y.dtype == torch.float32,
            RELOAD=reloads(settings, 4, D),
            AHEAD=settings.ahead,
            BLOCK_B=settings.block_sequences,
            BLOCK_D=block_of(D),
            num_warps=settings.num_warps,
            num_stages=1,
        )
    before = states_before(y, None if initial is None else initial.contiguous(), cu_seqlens)
    gradients = []
    for delta, weight, count in zip(deltas, weights, heads, strict=True):
        gradients.append(sum_heads(delta, y.new_empty((*y.shape[:-2], count, D))))
        gradients.append(weight_gradient(before, delta.reshape(-1, N, D), weight))
    given = (initial, initial_cell)
    for state, grad in zip(given, grad_states, strict=True):
        gradients.append(y.new_empty(0) if state is None else grad)
    return tuple(gradients)
