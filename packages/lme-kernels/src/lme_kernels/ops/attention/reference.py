"""Attention in plain torch, with the whole matrix of scores."""

import torch
from torch import Tensor

from lme_kernels.ops.attention.masks import visible
from lme_kernels.ops.attention.options import AttentionOptions
from lme_kernels.precision import compute_dtype


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
    sinks: Tensor | None,
    options: AttentionOptions,
) -> Tensor:
    compute = compute_dtype(query.dtype)
    N, D = query.shape[2:]
    # (B, N, S or T, D)
    q = query.to(compute).transpose(1, 2)
    groups = N // key.shape[2]
    k, v = (x.to(compute).repeat_interleave(groups, dim=2).transpose(1, 2) for x in (key, value))
    scores = (q @ k.transpose(-1, -2)) * options.factor(D)
    if options.softcap is not None:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    if mask is not None:
        scores = scores + mask.to(compute)
    seen = visible(query, key, options.causal, options.window, cu_seqlens)
    if seen is not None:
        scores = scores.masked_fill(~seen, float("-inf"))
    weights = _softmax(scores, None if sinks is None else sinks.to(compute).view(1, N, 1, 1))
    return (weights @ v).transpose(1, 2).to(query.dtype)


def _softmax(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Softmax in which a row of only -inf is zeros, and `sinks` take part without a column."""
    if scores.shape[-1] == 0:
        return scores
    # The maximum shifts numerator and denominator alike, so it is a constant to the gradient.
    largest = scores.detach().amax(dim=-1, keepdim=True)
    if sinks is not None:
        largest = torch.maximum(largest, sinks.detach())
    largest = largest.masked_fill(largest == float("-inf"), 0.0)
    powers = torch.exp(scores - largest)
    total = powers.sum(dim=-1, keepdim=True)
    if sinks is not None:
        total = total + torch.exp(sinks - largest)
    return powers / total.masked_fill(total == 0.0, 1.0)
