"""The gated delta rule in plain torch, by chunks."""

import torch
from torch import Tensor

from lme_kernels.ops.linear_attention.arguments import ChunkOptions, final_dtype
from lme_kernels.ops.linear_attention.chunks import Chunks

# Added to the squared norm of queries and keys.
NORM_EPS = 1e-6


def gated_delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    l2_normalize: bool,
    options: ChunkOptions,
) -> tuple[Tensor, Tensor]:
    N, size = log_decay.shape[-1], options.chunk_size
    chunks = Chunks(query, cu_seqlens, size)
    q, k, v = (chunks.split(each, N) for each in (query, key, value))
    strength = chunks.split(beta, N).unsqueeze(-1)
    until = chunks.split(log_decay, N).cumsum(-1).unsqueeze(-1)
    if l2_normalize:
        q, k = (
            each * torch.rsqrt(each.square().sum(-1, keepdim=True) + NORM_EPS) for each in (q, k)
        )
    q = q * options.scale
    seen = torch.ones(size, size, dtype=torch.bool, device=q.device).tril()
    # Where it would be positive, and might overflow, nothing is seen.
    between = torch.where(seen, until - until.mT, -torch.inf).exp()
    scores = q @ k.mT * between
    # What each token writes is `u = strength (v - decayed state k)`, in which the state holds what
    # the tokens before it in the chunk wrote: a triangular system.
    system = (k @ k.mT * between * strength).tril(-1)
    right = torch.cat((v, k * until.exp()), -1) * strength
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    written, erased = solved.split((v.shape[-1], k.shape[-1]), -1)
    end = until[..., -1:, :]
    q, k, decay = q * until.exp(), k * (end - until).exp(), end.exp()
    outputs = []

    def step(chunk: int, state: Tensor) -> Tensor:
        u = written[:, :, chunk] - erased[:, :, chunk] @ state
        outputs.append(scores[:, :, chunk] @ u + q[:, :, chunk] @ state)
        return state * decay[:, :, chunk] + k[:, :, chunk].mT @ u

    final = chunks.scan(initial_state, (N, k.shape[-1], v.shape[-1]), step, q)
    y = chunks.merge(torch.stack(outputs, 2))
    return y.to(query.dtype), final.to(final_dtype(query, initial_state))
