"""Attention by FlashAttention 2: the package where it is installed, else torch's copy of it."""

from lme_kernels.ops.attention import _flash
from lme_kernels.ops.attention._packages import is_installed, of_package

attention, why_not = (
    of_package("flash_attn", "flash-attn", -1)
    if is_installed("flash_attn")
    else (_flash.attention, _flash.why_not)
)
