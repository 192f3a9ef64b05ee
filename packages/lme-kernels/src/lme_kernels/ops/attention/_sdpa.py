"""Attention by `torch.nn.functional.scaled_dot_product_attention`."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from lme_kernels.ops.attention.masks import visible
from lme_kernels.ops.attention.options import AttentionOptions

# Fastest first: on an H100 cuDNN takes 0.6 times what FlashAttention 2 takes, forward and
# backward, and torch's own order has it last.
ORDER = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def why_not(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
    sinks: Tensor | None,
    options: AttentionOptions,
) -> str | None:
    """Say why torch's attention cannot serve a call."""
    if options.softcap is not None:
        return "it cannot bound the scores (`softcap`)"
    if sinks is not None:
        return "it has no `sinks`"
    if query.shape[1] == 0 or key.shape[1] == 0:
        return "there are no tokens"
    deterministic = torch.are_deterministic_algorithms_enabled()
    if options.deterministic and query.is_cuda and not deterministic:
        return "its backward is deterministic only under `torch.use_deterministic_algorithms`"
    return None


def suits(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
    sinks: Tensor | None,
    options: AttentionOptions,
) -> bool:
    """Whether it is the fastest: not where it would make a mask of all pairs to hide most."""
    sparse = cu_seqlens is not None or options.window is not None
    return not (sparse and query.is_cuda and query.shape[1] == key.shape[1])


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
    sinks: Tensor | None,
    options: AttentionOptions,
) -> Tensor:
    """Attend by the fastest of torch's kernels that takes the call."""
    if not query.is_cuda:
        return _attend(query, key, value, cu_seqlens, mask, options)
    if torch.compiler.is_compiling():
        with sdpa_kernel(ORDER, set_priority=True):
            return _attend(query, key, value, cu_seqlens, mask, options)
    # What `sdpa_kernel` does, without the hundred microseconds of Python around it.
    before = torch._C._get_sdp_priority_order()
    torch._C._set_sdp_priority_order([int(each.value) for each in ORDER])
    try:
        return _attend(query, key, value, cu_seqlens, mask, options)
    finally:
        torch._C._set_sdp_priority_order(before)


def only(
    kernel: SDPBackend, usable: Callable[..., bool]
) -> tuple[Callable[..., Tensor], Callable[..., str | None]]:
    """Make the implementation that takes one of torch's kernels and no other.

    Args:
        kernel: Which one.
        usable: Torch's function that says whether that kernel takes a call.

    Returns:
        `attention` and `why_not`.
    """

    def attention_by_kernel(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seqlens: Tensor | None,
        mask: Tensor | None,
        sinks: Tensor | None,
        options: AttentionOptions,
    ) -> Tensor:
        with sdpa_kernel(kernel):
            return _attend(query, key, value, cu_seqlens, mask, options)

    def why_not_by_kernel(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seqlens: Tensor | None,
        mask: Tensor | None,
        sinks: Tensor | None,
        options: AttentionOptions,
    ) -> str | None:
        if not query.is_cuda:
            return f"it runs on cuda tensors, and these are on {query.device.type}"
        reason = why_not(query, key, value, cu_seqlens, mask, sinks, options)
        if reason is not None or torch.compiler.is_compiling():
            return reason
        bias, is_causal = attention_bias(query, key, cu_seqlens, mask, options)
        q, k, v = (each.transpose(1, 2) for each in (query, key, value))
        grouped = query.shape[2] != key.shape[2]
        call = torch.backends.cuda.SDPAParams(q, k, v, bias, 0.0, is_causal, grouped)
        return None if usable(call) else "torch says that this kernel does not take such a call"

    return attention_by_kernel, why_not_by_kernel


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
    options: AttentionOptions,
) -> Tensor:
    bias, is_causal = attention_bias(query, key, cu_seqlens, mask, options)
    grouped = False
    # A branch, since a symbolic truth value is no bool to torch.
    if query.shape[2] != key.shape[2]:
        grouped = True
    y = F.scaled_dot_product_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        attn_mask=bias,
        is_causal=is_causal,
        scale=options.factor(query.shape[-1]),
        enable_gqa=grouped,
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
