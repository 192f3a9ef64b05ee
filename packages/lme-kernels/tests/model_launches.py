"""Calls of `linear_attention`, `mamba2_ssm` and `gated_delta_rule` at the sizes of models.

Their kernels take the most registers and shared memory; `compile_triton.py` compiles what these
calls launch, for a GPU that is not here. Nothing is computed, so tensors are left as they are.
"""

import torch

from lme_kernels.ops.gated_delta_rule._triton import gated_delta_rule
from lme_kernels.ops.linear_attention._triton import attend
from lme_kernels.ops.linear_attention.arguments import ChunkOptions


def tokens_of(*shape, dtype=torch.bfloat16, tokens=(4, 128)):
    return torch.empty(*tokens, *shape, dtype=dtype, requires_grad=True)


def linear(K, V, decay, heads=16, N=16, *, mamba=False, dtype=torch.bfloat16):
    """Launch forward and backward of linear attention."""
    query, key = tokens_of(heads, K, dtype=dtype), tokens_of(heads, K, dtype=dtype)
    value = tokens_of(N, V, dtype=dtype)
    log_decay = factor = skip = None
    if decay is not None:
        log_decay = tokens_of(N, *((K,) if decay == "channel" else ()), dtype=torch.float32)
    if mamba:
        factor, skip = tokens_of(N, dtype=torch.float32), torch.empty(N, requires_grad=True)
    y, _ = attend(query, key, value, log_decay, factor, skip, None, None, 0.1, True)
    y.backward(torch.empty_like(y))


def delta(size):
    """Launch forward and backward of the gated delta rule."""
    # Few enough that a program walks a narrow block of values.
    heads = [tokens_of(16, size, tokens=(1, 64)) for _ in range(3)]
    gates = [tokens_of(16, tokens=(1, 64)) for _ in range(2)]
    y, _ = gated_delta_rule(*heads, *gates, None, None, True, ChunkOptions(1.0, 64))
    y.backward(torch.empty_like(y))


def launch_all():
    """Make the calls, the widest of each kind; first those that compile in less time."""
    linear(128, 64, "head", 1, 32, mamba=True)
    linear(128, 128, None)
    linear(128, 128, "head", 4, 4, dtype=torch.float32)
    linear(256, 256, "head")
    linear(256, 256, "channel")
    for size in (128, 256):
        delta(size)
