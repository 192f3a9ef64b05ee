"""Linear attention with decay in Triton, by chunks.

Where there are enough sequences and heads, one kernel walks each sequence and writes outputs as it
goes; elsewhere one walks and keeps the state before each chunk, and another computes the outputs of
all chunks at once. The backward computes those states again, walks back for the gradients of states,
and computes the gradients of all chunks at once.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lme_kernels._triton_chunks import Slots, shared_bytes, sum_groups
from lme_kernels.custom_ops import define
from lme_kernels.device import why_not_shared, why_not_triton
from lme_kernels.ops.linear_attention._triton_channels import add_channel_gradients, channel_scores
from lme_kernels.ops.linear_attention._triton_gradients import write_gradients
from lme_kernels.ops.linear_attention._triton_outputs import walk_outputs, write_outputs
from lme_kernels.ops.linear_attention._triton_states import (
    sum_channel_decays,
    sum_decays,
    walk_states,
)
from lme_kernels.ops.linear_attention.arguments import ChunkOptions, num_sequences
from lme_kernels.ops.linear_attention.settings import chunk_settings, walks

MAX_CHANNELS = 256
MAX_CHANNELS_FLOAT32 = 128


def why_not(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
) -> str | None:
    return why_not_channels(query, value, key, log_decay, initial_state)


def why_not_channels(query: Tensor, value: Tensor, *others: Tensor | None) -> str | None:
    """Say why the kernels cannot take the tensors of a call."""
    reason = why_not_triton(query, value, *others)
    if reason is not None:
        return reason
    K, V = query.shape[-1], value.shape[-1]
    most = MAX_CHANNELS_FLOAT32 if query.dtype == torch.float32 else MAX_CHANNELS
    if not (1 <= K <= most and 1 <= V <= most):
        return f"heads have {K} and {V} channels, and in this dtype it takes from 1 to {most}"
    return why_not_shared(query, shared_bytes(K))


def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    options: ChunkOptions,
) -> tuple[Tensor, Tensor]:
    return attend(
        query,
        key,
        value,
        log_decay,
        None,
        None,
        initial_state,
        cu_seqlens,
        options.scale,
        options.inclusive,
    )


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor | None,
    factor: Tensor | None,
    skip: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    inclusive: bool,
) -> tuple[Tensor, Tensor]:
    """Run linear attention with keys times `factor`, and add values times `skip`.

    Args:
        query: As in the public function, like all that is not listed.
        key: Likewise.
        value: Likewise.
        log_decay: Likewise.
        factor: Factor of each key, shape (B, S, N) or (T, N); `None` for none.
        skip: Factor of each head's values, shape (N,); `None` for none.
        initial_state: Likewise.
        cu_seqlens: Likewise.
        scale: Likewise.
        inclusive: Likewise.

    Returns:
        Outputs and final states.
    """
    return _Attend.apply(
        query, key, value, log_decay, factor, skip, initial_state, cu_seqlens, scale, inclusive
    )


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, query, key, value, log_decay, factor, skip, initial, cu_seqlens, scale, inclusive
    ):
        ctx.save_for_backward(query, key, value, log_decay, factor, skip, initial, cu_seqlens)
        ctx.scale, ctx.inclusive = scale, inclusive
        ctx.set_materialize_grads(False)
        return _forward(
            query, key, value, log_decay, factor, skip, initial, cu_seqlens, scale, inclusive
        )

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y, grad_final):
        tensors = ctx.saved_tensors
        grads = _backward(*tensors, grad_y, grad_final, ctx.scale, ctx.inclusive)
        kept = (
            None if tensor is None else grad for tensor, grad in zip(tensors, grads, strict=False)
        )
        return *kept, None, None, None


def _heads(query, key, value):
    return max(each.shape[-2] for each in (query, key, value))


def _forward_fake(
    query, key, value, log_decay, factor, skip, initial, cu_seqlens, scale, inclusive
):
    N, K, V = _heads(query, key, value), query.shape[-1], value.shape[-1]
    y = query.new_empty((*query.shape[:-2], N, V))
    like = query if initial is None else initial
    return y, like.new_empty((num_sequences(query, cu_seqlens), N, K, V))


@define(
    "linear_attention_forward(Tensor query, Tensor key, Tensor value, Tensor? log_decay, "
    "Tensor? factor, Tensor? skip, Tensor? initial, Tensor? cu_seqlens, float scale, "
    "bool inclusive) -> (Tensor, Tensor)",
    _forward_fake,
)
def _forward(query, key, value, log_decay, factor, skip, initial, cu_seqlens, scale, inclusive):
    y, final = _forward_fake(
        query, key, value, log_decay, factor, skip, initial, cu_seqlens, scale, inclusive
    )
    sequences, N, K, V = final.shape
    sizes = (query.dtype, K, V, sequences * N, query.shape[-3])
    # Packed sequences may be as uneven as they like, and the longest would be walked alone.
    channels = log_decay is not None and log_decay.ndim == query.ndim
    walk = cu_seqlens is None and not channels and walks(sequences * N, query.shape[-1], V)
    settings = chunk_settings("walk" if walk else "outputs", *sizes, channels=channels)
    slots = Slots.of(query, cu_seqlens, settings.chunk)
    scores = None
    if channels:
        decay, weight = sum_channel_decays(log_decay, slots), None
        scores = channel_scores(query, key, decay, scale, inclusive, slots)
    else:
        decay, weight = sum_decays(log_decay, factor, slots, exact=query.dtype == torch.float32)
    options = (scale, inclusive, slots)
    if walk:
        walk_outputs(query, key, value, decay, weight, skip, initial, y, final, *options, settings)
        return y, final
    of_states = chunk_settings("states", *sizes, channels=channels)
    states = walk_states(key, value, decay, weight, initial, final, slots, of_states)
    write_outputs(query, key, value, decay, weight, skip, states, scores, y, *options, settings)
    return y, final


def _backward_fake(
    query,
    key,
    value,
    log_decay,
    factor,
    skip,
    initial,
    cu_seqlens,
    grad_y,
    grad_final,
    scale,
    inclusive,
):
    given = (query, key, value, log_decay, factor, skip, initial)
    return tuple(query.new_empty(0) if x is None else x.new_empty(x.shape) for x in given)


@define(
    "linear_attention_backward(Tensor query, Tensor key, Tensor value, Tensor? log_decay, "
    "Tensor? factor, Tensor? skip, Tensor? initial, Tensor? cu_seqlens, Tensor? grad_y, "
    "Tensor? grad_final, float scale, bool inclusive) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward_fake,
)
def _backward(
    query,
    key,
    value,
    log_decay,
    factor,
    skip,
    initial,
    cu_seqlens,
    grad_y,
    grad_final,
    scale,
    inclusive,
):
    N, K, V = _heads(query, key, value), query.shape[-1], value.shape[-1]
    tokens, sequences = query.shape[:-2], num_sequences(query, cu_seqlens)
    sizes = (query.dtype, K, V, sequences * N, query.shape[-3])
    if grad_y is None:
        grad_y = query.new_zeros((*tokens, N, V))
    channels = log_decay is not None and log_decay.ndim == query.ndim
    settings = chunk_settings("gradients", *sizes, channels=channels)
    of_states = chunk_settings("states", *sizes, channels=channels)
    slots = Slots.of(query, cu_seqlens, settings.chunk)
    of_scores = (None, None, None)
    if channels:
        decay, weight = sum_channel_decays(log_decay, slots), None
        scores = channel_scores(query, key, decay, scale, inclusive, slots)
        kept = torch.empty((slots.count, N, K), dtype=torch.float32, device=query.device)
        of_scores = (scores, torch.empty_like(scores), kept)
    else:
        decay, weight = sum_decays(log_decay, factor, slots, exact=query.dtype == torch.float32)
    final = query.new_empty((sequences, N, K, V))
    states = walk_states(key, value, decay, weight, initial, final, slots, of_states)
    grad_initial = (query if initial is None else initial).new_empty(final.shape)
    grad_states = walk_states(
        query,
        grad_y,
        decay,
        None,
        grad_final,
        grad_initial,
        slots,
        of_states,
        scale=scale,
        reverse=True,
        inclusive=inclusive,
    )
    grad_query, grad_key = (query.new_empty((*tokens, N, K)) for _ in range(2))
    grad_value = query.new_empty((*tokens, N, V))
    grad_decay, grad_factor = (
        None if x is None else x.new_empty(x.shape) for x in (log_decay, factor)
    )
    partials = None
    if skip is not None:
        partials = torch.empty((slots.count, N), dtype=torch.float32, device=query.device)
    grads = (grad_query, grad_key, grad_value, grad_decay, grad_factor, partials)
    write_gradients(
        query,
        key,
        value,
        grad_y,
        decay,
        weight,
        skip,
        states,
        grad_states,
        of_scores,
        grads,
        scale,
        inclusive,
        slots,
        settings,
    )
    if channels:
        through = (grad_query, grad_key)
        grad_query, grad_key = torch.empty_like(grad_query), torch.empty_like(grad_key)
        add_channel_gradients(
            query,
            key,
            decay,
            *of_scores[1:],
            through,
            (grad_query, grad_key, grad_decay),
            inclusive,
            slots,
            chunk_settings("keys", *sizes, channels=channels),
        )
    return (
        sum_groups(grad_query, query.shape[-2], query.dtype),
        sum_groups(grad_key, key.shape[-2], query.dtype),
        sum_groups(grad_value, value.shape[-2], query.dtype),
        query.new_empty(0) if grad_decay is None else grad_decay,
        query.new_empty(0) if grad_factor is None else grad_factor,
        query.new_empty(0) if partials is None else partials.sum(0).to(skip.dtype),
        query.new_empty(0) if initial is None else grad_initial,
    )
