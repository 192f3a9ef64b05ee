"""Attending as a batch asks: by the op, or explicitly where weights are dropped at random."""

from collections.abc import Callable

import torch
from torch import Tensor

from lme_core.layers import random
from lme_core.layers.context import SequenceContext

# Number of the weights' dropout within a layer.
_SITE = 1


def attend_in_context(
    attend: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    context: SequenceContext,
    *,
    scale: float,
    window: int | None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    p: float,
    part: int,
) -> Tensor:
    """Attend causally, by `attend` unless weights are to be dropped.

    Args:
        attend: The op `attention`, or what stands for it over devices.
        query: Shape (B, S, N, D).
        key: Shape (B, T, K, D).
        value: Shape (B, T, K, D').
        context: Facts about the batch.
        scale: Factor of query times key.
        window: Tokens that a token sees, itself among them; `None` for all before it.
        softcap: Bound on the scaled products' magnitude; `None` for none.
        sinks: A score for each head that has no value, shape (N,).
        p: Probability of dropping a weight in training.
        part: Which N of the layer's heads these are, where heads are cut over devices.

    Returns:
        Shape (B, S, N, D').
    """
    if p > 0 and context.dropout_key is not None:
        return attention_with_dropout(
            query,
            key,
            value,
            scale=scale,
            window=window,
            cu_seqlens=context.cu_seqlens,
            mask=context.mask,
            softcap=softcap,
            sinks=sinks,
            p=p,
            dropout_key=context.dropout_key,
            site=_SITE,
            token_index=context.token_index,
            part=part,
        )
    return attend(
        query,
        key,
        value,
        causal=True,
        scale=scale,
        window=window,
        softcap=softcap,
        cu_seqlens=context.cu_seqlens,
        mask=context.mask,
        sinks=sinks,
    )


def attention_with_dropout(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    window: int | None,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    p: float,
    dropout_key: Tensor,
    site: int,
    token_index: Tensor | None,
    part: int = 0,
) -> Tensor:
    """Attend causally and drop attention weights.

    Args:
        query: Shape (B, S, N, D).
        key: Shape (B, S, K, D).
        value: Shape (B, S, K, D).
        scale: Factor of query times key.
        window: Tokens that a token sees, itself among them; `None` for all before it.
        cu_seqlens: Bounds of documents over the flattened B*S tokens.
        mask: Added to the scores, shape (B, 1, S, S).
        softcap: Bound on the scaled products' magnitude; `None` for none.
        sinks: A score for each head that has no value, shape (N,); it is never dropped.
        p: Probability of dropping a weight, above 0.
        dropout_key: 0-d int64.
        site: Number of this dropout in its layer.
        token_index: int64, (B, S): each token's position in the global batch.
        part: Which N of the layer's heads these are, where heads are cut over devices.

    Returns:
        Shape (B, S, N, D), dtype of `query`; computed in at least float32. Each weight's fate
        depends on `dropout_key`, `site`, the query's token, the head and the key's column.

    Raises:
        ValueError: If `token_index` is absent.
    """
    if token_index is None:
        raise ValueError("`softmax_dropout` needs `token_index` in the batch")
    compute = torch.promote_types(query.dtype, torch.float32)
    B, S, N, _ = query.shape
    groups = N // key.shape[2]
    q, k, v = (each.to(compute).transpose(1, 2) for each in (query, key, value))
    k, v = (each.repeat_interleave(groups, dim=1) for each in (k, v))
    scores = q @ k.transpose(-1, -2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    rows = torch.arange(S, device=query.device)
    distance = rows[:, None] - rows
    seen = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    if cu_seqlens is not None:
        tokens = torch.arange(B * S, device=query.device)
        document = torch.searchsorted(cu_seqlens.to(tokens.dtype), tokens, right=True).view(B, S)
        seen = seen & (document[:, :, None] == document[:, None, :])[:, None]
    if mask is not None:
        scores = scores + mask
    scores = scores.masked_fill(~seen, float("-inf"))
    if sinks is None:
        weights = scores.softmax(dim=-1)
    else:
        sink = sinks.to(compute).view(-1, 1, 1).expand(B, N, S, 1)
        weights = torch.cat((scores, sink), dim=-1).softmax(dim=-1)[..., :-1]
    token_key = random.mix(random.mix(dropout_key, site + 1), token_index)[:, None, :, None]
    heads = part * N + torch.arange(N, device=query.device)
    # No sequence is that long, so that padding changes no counter. Shifted, not multiplied: Inductor
    # of torch 2.11 would take a product with 2**32 for an index of 32 bits.
    columns = (heads[:, None, None] << 32) + rows
    # The counter enters by XOR for the reason that `dropout` gives.
    keep = random.uniform(token_key ^ columns, 1) >= p
    weights = torch.where(keep, weights / (1.0 - p), 0.0)
    return (weights @ v).transpose(1, 2).to(query.dtype)
