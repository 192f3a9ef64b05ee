"""Attention by torch's memory-efficient kernel."""

import torch
from torch.nn.attention import SDPBackend

from lme_kernels.ops.attention._sdpa import only

attention, why_not = only(
    SDPBackend.EFFICIENT_ATTENTION, torch.backends.cuda.can_use_efficient_attention
)
