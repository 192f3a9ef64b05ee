"""Attention by FlashAttention 2: the package where it is installed, else torch's copy of it."""

from torch import Tensor

from lme_kernels.ops.attention import _flash, _flash_varlen
from lme_kernels.ops.attention._packages import is_installed, of_package
from lme_kernels.ops.attention.options import AttentionOptions


def _why_not_torchs(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
    sinks: Tensor | None,
    options: AttentionOptions,
) -> str | None:
    """Say why torch's copy cannot serve a call."""
    call = (query, key, value, cu_seqlens, mask, sinks, options)
    return (_flash_varlen if _flash_varlen.suits(*call) else _flash).why_not(*call)


def _attend_by_torchs(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
    sinks: Tensor | None,
    options: AttentionOptions,
) -> Tensor:
    """Attend by torch's copy."""
    call = (query, key, value, cu_seqlens, mask, sinks, options)
    return (_flash_varlen if _flash_varlen.suits(*call) else _flash).attention(*call)


attention, why_not = (
    of_package("flash_attn", "flash-attn", -1)
    if is_installed("flash_attn")
    else (_attend_by_torchs, _why_not_torchs)
)
