"""Modules over the ops, with parameters named and shaped as torch's own where torch has the module."""

from lme_kernels.nn.activations import GEGLU, PackedSwiGLU, ReLUSquared, SwiGLU
from lme_kernels.nn.convolution import CausalConv1d
from lme_kernels.nn.losses import CrossEntropyLoss, LinearCrossEntropyLoss
from lme_kernels.nn.norms import GatedRMSNorm, LayerNorm, PNorm, RMSNorm
from lme_kernels.nn.recurrent import GRU, LSTM, RNN

__all__ = [
    "GEGLU",
    "GRU",
    "LSTM",
    "RNN",
    "CausalConv1d",
    "CrossEntropyLoss",
    "GatedRMSNorm",
    "LayerNorm",
    "LinearCrossEntropyLoss",
    "PNorm",
    "PackedSwiGLU",
    "RMSNorm",
    "ReLUSquared",
    "SwiGLU",
]
