"""Attention by torch's FlashAttention 2."""

import torch
from torch.nn.attention import SDPBackend

from lme_kernels.ops.attention._sdpa import only

attention, why_not = only(SDPBackend.FLASH_ATTENTION, torch.backends.cuda.can_use_flash_attention)
