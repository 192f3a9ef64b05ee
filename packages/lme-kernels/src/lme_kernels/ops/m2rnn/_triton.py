"""Recurrence of matrices in Triton, with states kept every few tokens."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lme_kernels._triton_rows import num_processors
from lme_kernels.custom_ops import define
from lme_kernels.device import why_not_triton
from lme_kernels.ops.m2rnn._triton_kernels import backward_kernel, forward_kernel
from lme_kernels.ops.rnn._triton_scan import as_tokens, sum_heads, transposed
from lme_kernels.ops.rnn.sequences import ScanOptions, num_sequences
from lme_kernels.ops.rnn.settings import block_of, matrix_settings

MAX_STATE = 8192
# Programs of the backward that a multiprocessor holds at once.
RESIDENT = 4


def why_not(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    forget: Tensor,
    initial: Tensor | None,
) -> str | None:
    K, V = key.shape[-1], value.shape[-1]
    if K == 0 or V == 0 or block_of(K) * block_of(V) > MAX_STATE:
        return (
            f"the state has shape ({K}, {V}), and it takes at most {MAX_STATE} numbers, sizes "
            "rounded up to powers of two from 16 on"
        )
    return why_not_triton(query, key, value, weight, forget, initial)


def m2rnn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    forget: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    options: ScanOptions,
) -> tuple[Tensor, Tensor]:
    clip = options.gradient_clipping
    return _M2RNN.apply(query, key, value, weight, forget, initial_state, cu_seqlens, clip)


def tokens_between_states(K: int, V: int) -> int:
    """Tokens after which the forward keeps the state: fewer where it is large."""
    return 32 if block_of(K) * block_of(V) <= 2048 else 16


class _M2RNN(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, weight, forget, initial, cu_seqlens, clip):
        keep = any(ctx.needs_input_grad)
        y, kept, final = _forward(query, key, value, weight, forget, initial, cu_seqlens, keep)
        ctx.save_for_backward(query, key, value, weight, forget, kept, initial, cu_seqlens)
        ctx.clip = clip
        ctx.set_materialize_grads(False)
        return y, final

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y, grad_final):
        query, *saved = ctx.saved_tensors
        *gradients, grad_initial = _backward(query, *saved, grad_y, grad_final, ctx.clip)
        return *gradients, None if saved[-2] is None else grad_initial, None, None


def _heads(query, key, value, weight, forget):
    heads = (each.shape[-2] for each in (query, key, value))
    return max(*heads, weight.shape[0], forget.shape[-1])


def _forward_fake(query, key, value, weight, forget, initial, cu_seqlens, keep):
    N, K, V = _heads(query, key, value, weight, forget), key.shape[-1], value.shape[-1]
    sequences = num_sequences(query, cu_seqlens)
    y = query.new_empty((*query.shape[:-2], N, V))
    tokens = query.shape[0] if cu_seqlens is not None else query.shape[0] * query.shape[1]
    stretches = tokens // tokens_between_states(K, V) + sequences
    kept = query.new_empty((stretches, N, K, V) if keep else (0,), dtype=torch.float32)
    return y, kept, (query if initial is None else initial).new_empty((sequences, N, K, V))


@define(
    "m2rnn_forward(Tensor query, Tensor key, Tensor value, Tensor weight, Tensor forget, "
    "Tensor? initial, Tensor? cu_seqlens, bool keep) -> (Tensor, Tensor, Tensor)",
    _forward_fake,
)
def _forward(query, key, value, weight, forget, initial, cu_seqlens, keep):
    y, kept, final = _forward_fake(query, key, value, weight, forget, initial, cu_seqlens, keep)
    sequences, N, K, V = final.shape
    if sequences == 0:
        return y, kept, final
    settings = matrix_settings("m2rnn.forward", K, V)
    inputs, strides, groups = _inputs(query, key, value, forget, N)
    forward_kernel[(sequences, N)](
        *inputs[:3],
        weight.contiguous(),
        inputs[3],
        None if initial is None else initial.contiguous(),
        None if cu_seqlens is None else cu_seqlens.contiguous(),
        y,
        kept,
        final,
        y.shape[-3],
        sequences,
        *strides,
        N=N,
        K=K,
        V=V,
        QUERY_GROUP=groups[0],
        KEY_GROUP=groups[1],
        VALUE_GROUP=groups[2],
        WEIGHT_GROUP=N // weight.shape[0],
        FORGET_GROUP=groups[3],
        EVERY=tokens_between_states(K, V),
        SAVE=keep,
        HAS_INITIAL=initial is not None,
        PACKED=cu_seqlens is not None,
        EXACT=y.dtype == torch.float32,
        AHEAD=settings.ahead,
        BLOCK_K=block_of(K),
        BLOCK_V=block_of(V),
        num_warps=settings.num_warps,
        num_stages=1,
    )
    return y, kept, final


def _backward_fake(
    query, key, value, weight, forget, kept, initial, cu_seqlens, grad_y, grad_final, clip
):
    N = _heads(query, key, value, weight, forget)
    state = (num_sequences(query, cu_seqlens), N, key.shape[-1], value.shape[-1])
    grads = (each.new_empty(each.shape) for each in (query, key, value, weight, forget))
    return *grads, query.new_empty(0) if initial is None else initial.new_empty(state)


@define(
    "m2rnn_backward(Tensor query, Tensor key, Tensor value, Tensor weight, Tensor forget, "
    "Tensor kept, Tensor? initial, Tensor? cu_seqlens, Tensor? grad_y, Tensor? grad_final, "
    "float? clip) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward_fake,
)
def _backward(
    query, key, value, weight, forget, kept, initial, cu_seqlens, grad_y, grad_final, clip
):
    N, K, V = _heads(query, key, value, weight, forget), key.shape[-1], value.shape[-1]
    tokens, sequences = query.shape[:-2], num_sequences(query, cu_seqlens)
    # Without a gradient of `y` there is none of `query`.
    grad_query = (query.new_zeros if grad_y is None else query.new_empty)((*tokens, N, K))
    grad_key, grad_value = query.new_empty((*tokens, N, K)), query.new_empty((*tokens, N, V))
    grad_forget = query.new_empty((*tokens, N, 1))
    partials = query.new_empty((sequences, N, V, V), dtype=torch.float32)
    grad_initial = (query if initial is None else initial).new_empty((sequences, N, K, V))
    if sequences > 0:
        settings = matrix_settings("m2rnn.backward", K, V)
        inputs, strides, groups = _inputs(query, key, value, forget, N)
        programs = min(sequences * N, RESIDENT * num_processors(query.device))
        every = tokens_between_states(K, V)
        scratch = query.new_empty((programs, every, block_of(K), block_of(V)), dtype=torch.float32)
        backward_kernel[(programs,)](
            None if grad_y is None else grad_y.contiguous(),
            None if grad_final is None else grad_final.contiguous(),
            *inputs[:3],
            weight.contiguous(),
            transposed(weight),
            inputs[3],
            kept,
            scratch,
            None if cu_seqlens is None else cu_seqlens.contiguous(),
            grad_query,
            grad_key,
            grad_value,
            partials,
            grad_forget,
            grad_initial,
            query.shape[-3],
            sequences,
            0.0 if clip is None else clip,
            *strides,
            N=N,
            K=K,
            V=V,
            QUERY_GROUP=groups[0],
            KEY_GROUP=groups[1],
            VALUE_GROUP=groups[2],
            WEIGHT_GROUP=N // weight.shape[0],
            FORGET_GROUP=groups[3],
            EVERY=every,
            CLIP=clip is not None,
            HAS_GRAD_Y=grad_y is not None,
            HAS_GRAD_FINAL=grad_final is not None,
            PACKED=cu_seqlens is not None,
            EXACT=query.dtype == torch.float32,
            BLOCK_K=block_of(K),
            BLOCK_V=block_of(V),
            num_warps=settings.num_warps,
            num_stages=1,
        )
    grads = (grad_query, grad_key, grad_value)
    of_heads = [sum_heads(g, e) for g, e in zip(grads, (query, key, value), strict=True)]
    grouped = partials.reshape(sequences, weight.shape[0], N // weight.shape[0], V, V)
    grad_weight = grouped.sum((0, 2)).to(weight.dtype)
    grad_forget = sum_heads(grad_forget, forget[..., None])[..., 0]
    absent = query.new_empty(0) if initial is None else grad_initial
    return *of_heads, grad_weight, grad_forget.contiguous(), absent


def _inputs(query, key, value, forget, N):
    """Inputs whose tokens and heads have strides, the strides in pairs, and sizes of groups."""
    found = [as_tokens(each) for each in (query, key, value, forget[..., None])]
    groups = [N // each[0].shape[-2] for each in found]
    return [each[0] for each in found], [s for each in found for s in each[1:]], groups
