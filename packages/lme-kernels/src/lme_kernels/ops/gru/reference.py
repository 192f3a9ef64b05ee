"""Gated recurrent unit in plain torch, one time after the other."""

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
    inputs = (x, forget_input, reset_input)
    matrices = (weight, forget_weight, reset_weight)
    N = max(*(each.shape[-2] for each in inputs), *(each.shape[0] for each in matrices))
    D = x.shape[-1]
    steps = Steps(x, cu_seqlens, options.max_seqlen)
    update, forget, reset = (spread(each, N, x) for each in matrices)
    state = first_state(initial_state, N, num_sequences(x, cu_seqlens), (D,), x)
    start, outputs = state, []
    by_time = zip(*(steps.split(each, N) for each in inputs), strict=True)
    for t, (x_t, forget_t, reset_t) in enumerate(by_time):
        f = torch.sigmoid(torch.baddbmm(forget_t, state, forget))
        r = torch.sigmoid(torch.baddbmm(reset_t, state, reset))
        z = torch.tanh(torch.baddbmm(x_t, r * state, update))
        new = clip_gradient(f * state + (1.0 - f) * z, options.gradient_clipping)
        state = steps.keep(t, new, state)
        outputs.append(new)
    return steps.merge(outputs, start), last_state(state, initial_state, x)
