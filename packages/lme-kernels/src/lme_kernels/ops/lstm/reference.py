"""Long short-term memory in plain torch, one time after the other."""

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
    inputs = (x, forget_input, input_input, output_input)
    matrices = (weight, forget_weight, input_weight, output_weight)
    N = max(*(each.shape[-2] for each in inputs), *(each.shape[0] for each in matrices))
    sequences, D = num_sequences(x, cu_seqlens), x.shape[-1]
    steps = Steps(x, cu_seqlens, options.max_seqlen)
    clip = options.gradient_clipping
    update, *gates = (spread(each, N, x) for each in matrices)
    state = first_state(initial_state, N, sequences, (D,), x)
    cell = first_state(initial_cell, N, sequences, (D,), x)
    start, outputs = state, []
    by_time = zip(*(steps.split(each, N) for each in inputs), strict=True)
    for t, (x_t, *gates_t) in enumerate(by_time):
        g = torch.tanh(torch.baddbmm(x_t, state, update))
        f, i, o = (
            torch.sigmoid(torch.baddbmm(each, state, matrix))
            for each, matrix in zip(gates_t, gates, strict=True)
        )
        new_cell = clip_gradient(f * cell + i * g, clip)
        new = clip_gradient(o * torch.tanh(new_cell), clip)
        cell, state = steps.keep(t, new_cell, cell), steps.keep(t, new, state)
        outputs.append(new)
    y = steps.merge(outputs, start)
    return y, last_state(state, initial_state, x), last_state(cell, initial_cell, x)
