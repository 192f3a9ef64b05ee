"""Attention by `torch.nn.functional.scaled_dot_product_attention`."""

from torch import Tensor
from torch.nn import functional as F

from lme_kernels.ops.attention.masks import visible
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
    if options.softcap is not None:
        return "it cannot bound the scores (`softcap`)"
    if sinks is not None:
        return "it has no `sinks`"
    if query.shape[1] == 0 or key.shape[1] == 0:
        return "there are no tokens"
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
    bias, is_causal = attention_bias(query, key, cu_seqlens, mask, options)
    y = F.scaled_dot_product_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        attn_mask=bias,
        is_causal=is_causal,
        scale=options.factor(query.shape[-1]),
        enable_gqa=bool(query.shape[2] != key.shape[2]),
    )
    return y.transpose(1, 2)


def attention_bias(
    query: Tensor,
    key: Tensor,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
    options: AttentionOptions,
) -> tuple[Tensor | None, bool]:
    """Express a call's masks as torch takes them: an added or boolean mask, and `is_causal`."""
    S, T = query.shape[1], key.shape[1]
    plain = cu_seqlens is None and mask is None
    if plain and (options.window is None or options.window >= T):
        # One query is the last one: it sees every key. Torch aligns the first query with the
        # first key, which is another thing unless there are as many.
        if not options.causal or S == 1:
            return None, False
        if S == T:
            return None, True
    seen = visible(query, key, options.causal, options.window, cu_seqlens)
    if mask is None:
        return seen, False
    bias = mask.to(query.dtype)
    return (bias if seen is None else bias.masked_fill(~seen, float("-inf"))), False
