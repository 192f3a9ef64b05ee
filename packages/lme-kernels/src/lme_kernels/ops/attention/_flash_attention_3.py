"""Attention by the package of FlashAttention 3."""

from lme_kernels.ops.attention._packages import of_package

attention, why_not = of_package("flash_attn_interface", "flash-attn-3", -1)
