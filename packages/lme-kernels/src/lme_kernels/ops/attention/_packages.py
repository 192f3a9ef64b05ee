"""Attention by the FlashAttention packages, where they are installed."""

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lme_kernels.ops.attention.options import AttentionOptions

HALVES = (torch.float16, torch.bfloat16)


def is_installed(module: str) -> bool:
    """Whether a module can be imported; the packages above it are, to find out."""
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def of_package(
    module: str, distribution: str, no_window: int | None
) -> tuple[Callable[..., Tensor], Callable[..., str | None]]:
    """Make the implementation that calls a FlashAttention package.

    The packages share names and arguments of `flash_attn_func` and `flash_attn_varlen_func`, and
    differ in what stands for no window.

    Args:
        module: Module that defines the two functions.
        distribution: What to install.
        no_window: What the package takes for a side without a window.

    Returns:
        `attention` and `why_not`.
    """
    package = import_module(module) if is_installed(module) else None

    def why_not(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seqlens: Tensor | None,
        mask: Tensor | None,
        sinks: Tensor | None,
        options: AttentionOptions,
    ) -> str | None:
        if package is None:
            return f"the package `{distribution}` is not installed"
        return why_not_flash(query, key, mask, sinks)

    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seqlens: Tensor | None,
        mask: Tensor | None,
        sinks: Tensor | None,
        options: AttentionOptions,
    ) -> Tensor:
        if package is None:
            raise RuntimeError(f"the package `{distribution}` is not installed")
        side = no_window if options.window is None else options.window - 1
        window = (side, 0 if options.causal and options.window is not None else side)
        keywords: dict[str, Any] = {
            "softmax_scale": options.factor(query.shape[-1]),
            "causal": options.causal,
            "window_size": window,
            "softcap": options.softcap or 0.0,
            "deterministic": options.deterministic,
        }
        return _call(package, query, key, value, cu_seqlens, keywords)

    return attention, why_not


def why_not_flash(
    query: Tensor, key: Tensor, mask: Tensor | None, sinks: Tensor | None
) -> str | None:
    """Say why no FlashAttention can serve a call."""
    if not query.is_cuda:
        return f"it runs on cuda tensors, and these are on {query.device.type}"
    if query.dtype not in HALVES:
        return f"it takes float16 and bfloat16, and these are {query.dtype}"
    if mask is not None:
        return "it takes no added `mask`"
    if sinks is not None:
        return "it has no `sinks`"
    if query.shape[1] == 0 or key.shape[1] == 0:
        return "there are no tokens"
    return None


def _call(
    package: ModuleType,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor | None,
    keywords: dict[str, Any],
) -> Tensor:
    functions = vars(package)
    if cu_seqlens is None:
        result = functions["flash_attn_func"](query, key, value, **keywords)
        return result[0] if isinstance(result, tuple) else result
    starts = cu_seqlens.to(torch.int32)
    S = query.shape[1]
    result = functions["flash_attn_varlen_func"](
        query.flatten(0, 1),
        key.flatten(0, 1),
        value.flatten(0, 1),
        cu_seqlens_q=starts,
        cu_seqlens_k=starts,
        # No document is longer than its row.
        max_seqlen_q=S,
        max_seqlen_k=S,
        **keywords,
    )
    packed = result[0] if isinstance(result, tuple) else result
    return packed.unflatten(0, query.shape[:2])
