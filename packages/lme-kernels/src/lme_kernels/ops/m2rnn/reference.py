"""Recurrence of a matrix in plain torch, one time after the other."""

import torch
from torch import Tensor

from lme_kernels.ops.rnn.sequences import (
    ScanOptions,
    Steps,
    clip_gradient,
    first_state,
    last_state,
    num_sequences,
    spread,
)


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
    K, V = key.shape[-1], value.shape[-1]
    heads = (each.shape[-2] for each in (query, key, value))
    N = max(*heads, forget.shape[-1], weight.shape[0])
    steps = Steps(query, cu_seqlens, options.max_seqlen)
    weights = spread(weight, N, query)[:, None]
    sequences = num_sequences(query, cu_seqlens)
    state = first_state(initial_state, N, sequences, (K, V), query)
    start, outputs = state[..., 0, :], []
    by_time = zip(
        *(steps.split(each, N) for each in (query, key, value, forget[..., None])), strict=True
    )
    for t, (query_t, key_t, value_t, forget_t) in enumerate(by_time):
        update = torch.tanh(state @ weights + key_t[..., None] * value_t[..., None, :])
        kept = forget_t[..., None]
        new = clip_gradient(kept * state + (1.0 - kept) * update, options.gradient_clipping)
        state = steps.keep(t, new, state)
        outputs.append((query_t[..., None, :] @ new).squeeze(-2))
    return steps.merge(outputs, start), last_state(state, initial_state, query)
