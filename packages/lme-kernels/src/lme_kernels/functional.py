"""Every public function, and the list of ops: one line an op."""

# ruff: noqa: F401

from collections.abc import Mapping
from types import MappingProxyType

from lme_kernels.op import Op
from lme_kernels.ops.attention import ATTENTION, attention
from lme_kernels.ops.causal_conv1d import CAUSAL_CONV1D, causal_conv1d
from lme_kernels.ops.continuous_count import CONTINUOUS_COUNT, continuous_count
from lme_kernels.ops.cross_entropy import CROSS_ENTROPY, cross_entropy
from lme_kernels.ops.fused_linear_cross_entropy import (
    FUSED_LINEAR_CROSS_ENTROPY,
    fused_linear_cross_entropy,
)
from lme_kernels.ops.fused_linear_kl_div import FUSED_LINEAR_KL_DIV, fused_linear_kl_div
from lme_kernels.ops.fused_linear_logprob import FUSED_LINEAR_LOGPROB, fused_linear_logprob
from lme_kernels.ops.fused_linear_topk_kl_div import (
    FUSED_LINEAR_TOPK_KL_DIV,
    fused_linear_topk_kl_div,
)
from lme_kernels.ops.fused_residual_add_rmsnorm import (
    FUSED_RESIDUAL_ADD_RMSNORM,
    fused_residual_add_rmsnorm,
)
from lme_kernels.ops.gated_delta_rule import GATED_DELTA_RULE, gated_delta_rule
from lme_kernels.ops.gated_rmsnorm import GATED_RMSNORM, gated_rmsnorm
from lme_kernels.ops.geglu import GEGLU, geglu
from lme_kernels.ops.gru import GRU, gru
from lme_kernels.ops.layernorm import LAYERNORM, layernorm
from lme_kernels.ops.linear_attention import LINEAR_ATTENTION, linear_attention
from lme_kernels.ops.lstm import LSTM, lstm
from lme_kernels.ops.m2rnn import M2RNN, m2rnn
from lme_kernels.ops.mamba2_ssm import MAMBA2_SSM, mamba2_ssm
from lme_kernels.ops.p_norm import P_NORM, p_norm
from lme_kernels.ops.pack_sequence import PACK_SEQUENCE, pack_sequence
from lme_kernels.ops.qk_norm_rope import QK_NORM_ROPE, qk_norm_rope
from lme_kernels.ops.relu_squared import RELU_SQUARED, relu_squared
from lme_kernels.ops.rmsnorm import RMSNORM, rmsnorm
from lme_kernels.ops.rnn import RNN, rnn
from lme_kernels.ops.rope import ROPE, rope
from lme_kernels.ops.router_topk import ROUTER_TOPK, router_topk
from lme_kernels.ops.scattermoe import SCATTERMOE, scattermoe
from lme_kernels.ops.softmax import SOFTMAX, softmax
from lme_kernels.ops.sort_by_expert import SORT_BY_EXPERT, sort_by_expert
from lme_kernels.ops.swiglu import SWIGLU, swiglu
from lme_kernels.ops.swiglu_packed import SWIGLU_PACKED, swiglu_packed
from lme_kernels.ops.unpack_sequence import UNPACK_SEQUENCE, unpack_sequence

ALL_OPS: Mapping[str, Op] = MappingProxyType(
    {
        op.name: op
        for op in (
            ATTENTION,
            CAUSAL_CONV1D,
            CONTINUOUS_COUNT,
            CROSS_ENTROPY,
            FUSED_LINEAR_CROSS_ENTROPY,
            FUSED_LINEAR_KL_DIV,
            FUSED_LINEAR_LOGPROB,
            FUSED_LINEAR_TOPK_KL_DIV,
            FUSED_RESIDUAL_ADD_RMSNORM,
            GATED_DELTA_RULE,
            GATED_RMSNORM,
            GEGLU,
            GRU,
            LAYERNORM,
            LINEAR_ATTENTION,
            LSTM,
            M2RNN,
            MAMBA2_SSM,
            P_NORM,
            PACK_SEQUENCE,
            QK_NORM_ROPE,
            RELU_SQUARED,
            RMSNORM,
            RNN,
            ROPE,
            ROUTER_TOPK,
            SCATTERMOE,
            SOFTMAX,
            SORT_BY_EXPERT,
            SWIGLU,
            SWIGLU_PACKED,
            UNPACK_SEQUENCE,
        )
    }
)
"""Every op by name."""
