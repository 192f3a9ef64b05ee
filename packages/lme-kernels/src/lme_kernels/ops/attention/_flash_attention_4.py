"""Attention by the package of FlashAttention 4."""

from lme_kernels.ops.attention._packages import of_package

attention, why_not = of_package("flash_attn.cute", "flash-attn-4", None)
