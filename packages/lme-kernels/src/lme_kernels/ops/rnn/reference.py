"""Recurrence of Elman in plain torch, one time after the other."""

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


def rnn(
    x: Tensor,
    weight: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    nonlinearity: str,
    options: ScanOptions,
) -> tuple[Tensor, Tensor]:
    N, D = max(x.shape[-2], weight.shape[0]), x.shape[-1]
    steps = Steps(x, cu_seqlens, options.max_seqlen)
    weights = spread(weight, N, x)
    state = first_state(initial_state, N, num_sequences(x, cu_seqlens), (D,), x)
    start, outputs = state, []
    activation = torch.tanh if nonlinearity == "tanh" else torch.relu
    for t, x_t in enumerate(steps.split(x, N)):
        new = activation(torch.baddbmm(x_t, state, weights))
        new = clip_gradient(new, options.gradient_clipping)
        state = steps.keep(t, new, state)
        outputs.append(new)
    return steps.merge(outputs, start), last_state(state, initial_state, x)
