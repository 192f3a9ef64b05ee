"""Attention by cuDNN."""

import torch
from torch.nn.attention import SDPBackend

from lme_kernels.ops.attention._sdpa import only

attention, why_not = only(SDPBackend.CUDNN_ATTENTION, torch.backends.cuda.can_use_cudnn_attention)
