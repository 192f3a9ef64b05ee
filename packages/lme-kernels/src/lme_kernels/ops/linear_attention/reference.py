"""Linear attention with decay in plain torch, by chunks."""

import torch
from torch import Tensor

from lme_kernels.ops.linear_attention.arguments import ChunkOptions, final_dtype
from lme_kernels.ops.linear_attention.chunks import Chunks

# The products of a chunk have an extra dimension when each channel decays by itself.
CHANNEL_CHUNK = 16


def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    options: ChunkOptions,
) -> tuple[Tensor, Tensor]:
    y, state = attend(query, key, value, log_decay, initial_state, cu_seqlens, options)
    return y.to(query.dtype), state.to(final_dtype(query, initial_state))


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    options: ChunkOptions,
) -> tuple[Tensor, Tensor]:
    """Compute what `linear_attention` does, and round nothing: results in at least float32."""
    N = max(each.shape[-2] for each in (query, key, value))
    per_channel = log_decay is not None and log_decay.ndim == query.ndim
    size = min(options.chunk_size, CHANNEL_CHUNK) if per_channel else options.chunk_size
    chunks = Chunks(query, cu_seqlens, size)
    q, k, v = (chunks.split(each, N) for each in (query, key, value))
    q = q * options.scale
    seen = torch.ones(size, size, dtype=torch.bool, device=q.device)
    seen = seen.tril(0 if options.inclusive else -1)
    decay = None
    if log_decay is None:
        scores = torch.where(seen, q @ k.mT, 0.0)
    else:
        step = chunks.split(log_decay, N)
        step = step if per_channel else step.unsqueeze(-1)
        until = step.cumsum(-2)
        reached = until if options.inclusive else until - step
        difference = reached.unsqueeze(-2) - until.unsqueeze(-3)
        # Where it would be positive, and might overflow, nothing is seen.
        between = torch.where(seen.unsqueeze(-1), difference, -torch.inf).exp()
        if per_channel:
            scores = torch.einsum("...tk,...sk,...tsk->...ts", q, k, between)
        else:
            scores = q @ k.mT * between.squeeze(-1)
        end = until[..., -1:, :]
        q, k, decay = q * reached.exp(), k * (end - until).exp(), end.mT.exp()
    update = k.mT @ v
    before = []

    def step_over(chunk: int, state: Tensor) -> Tensor:
        before.append(state)
        kept = state if decay is None else state * decay[:, :, chunk]
        return kept + update[:, :, chunk]

    shape = (N, q.shape[-1], v.shape[-1])
    final = chunks.scan(initial_state, shape, step_over, q)
    y = scores @ v + q @ torch.stack(before, 2)
    return chunks.merge(y), final
