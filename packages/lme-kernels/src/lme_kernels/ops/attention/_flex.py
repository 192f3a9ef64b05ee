"""Attention by FlexAttention: windows, documents, bounds and sinks without a mask of all pairs."""

from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import (
    AuxRequest,
    BlockMask,
    create_block_mask,
    flex_attention,
)

from lme_kernels.ops.attention.masks import document_of_token
from lme_kernels.ops.attention.options import AttentionOptions


def why_not(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
    sinks: Tensor | None,
    options: AttentionOptions,
) -> str | None:
    """Say why FlexAttention cannot serve a call."""
    if not query.is_cuda:
        return f"it trains on cuda tensors, and these are on {query.device.type}"
    if query.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"{query.dtype} is not among float32, float16 and bfloat16"
    if mask is not None:
        return "it takes no added `mask`"
    if query.shape[1] != key.shape[1]:
        return "it is compiled for as many keys as queries"
    if query.shape[1] == 0:
        return "there are no tokens"
    if max(query.shape[-1], value.shape[-1]) > 256:
        return f"heads have {query.shape[-1]} channels, and it takes at most 256"
    return None


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
    sinks: Tensor | None,
    options: AttentionOptions,
) -> Tensor:
    """Attend by FlexAttention, compiled once for each kind of call.

    As of everything that is compiled, a graph can be walked back once: a second time, with
    `retain_graph=True`, raises.
    """
    q, k, v = (each.transpose(1, 2) for each in (query, key, value))
    result = _flex()(
        q,
        k,
        v,
        score_mod=None if options.softcap is None else _bound(options.softcap),
        block_mask=_block_mask(query, cu_seqlens, options),
        scale=options.factor(query.shape[-1]),
        enable_gqa=bool(query.shape[2] != key.shape[2]),
        return_aux=None if sinks is None else AuxRequest(lse=True),
    )
    if sinks is None:
        return result.transpose(1, 2)
    y, auxiliary = result
    # A sink adds exp(sink) to the denominator and nothing else.
    share = torch.sigmoid(auxiliary.lse - sinks.float().view(1, -1, 1))
    return (y * share.unsqueeze(-1)).to(query.dtype).transpose(1, 2)


def _block_mask(
    query: Tensor, cu_seqlens: Tensor | None, options: AttentionOptions
) -> BlockMask | None:
    B, S = query.shape[:2]
    if cu_seqlens is None:
        if not options.causal and options.window is None:
            return None
        if torch.compiler.is_compiling():
            sees = _sees(options.causal, options.window, None)
            return create_block_mask(sees, None, None, S, S, device=query.device)
        return _fixed_block_mask(options.causal, options.window, S, query.device)
    sees = _sees(options.causal, options.window, document_of_token(cu_seqlens, B, S))
    return _make_mask()(sees, B, None, S, S, device=query.device)


@lru_cache(maxsize=64)
def _fixed_block_mask(causal: bool, window: int | None, S: int, device: torch.device) -> BlockMask:
    return create_block_mask(_sees(causal, window, None), None, None, S, S, device=str(device))


def _sees(causal: bool, window: int | None, document: Tensor | None) -> Callable[..., Tensor]:
    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = query >= key if causal else query == query
        if window is not None:
            seen = seen & ((query - key).abs() < window)
        if document is not None:
            seen = seen & (document[batch, query] == document[batch, key])
        return seen

    return sees


def _bound(softcap: float) -> Callable[..., Tensor]:
    def bound(score: Tensor, *_: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return bound


# Functions of torch: what they return depends on flags.
def _flex() -> Callable[..., Any]:
    return flex_attention if torch.compiler.is_compiling() else _compiled_flex()


def _make_mask() -> Callable[..., Any]:
    return create_block_mask if torch.compiler.is_compiling() else _compiled_mask()


@cache
def _compiled_flex() -> Callable[..., Any]:
    return torch.compile(flex_attention)


@cache
def _compiled_mask() -> Callable[..., Any]:
    return torch.compile(create_block_mask)
