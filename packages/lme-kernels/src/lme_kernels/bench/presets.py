"""Which sizes are measured together."""

from collections.abc import Mapping

import torch

from lme_kernels.bench import cases_losses as losses
from lme_kernels.bench import cases_optim as optim
from lme_kernels.bench import cases_rows as rows
from lme_kernels.bench import cases_sequences as sequences
from lme_kernels.bench.calls import Case

# The sizes whose times users of other libraries know.
GOALS = (
    rows.rmsnorm(16384, 4096),
    rows.fused_residual_add_rmsnorm(16384, 4096),
    rows.gated("swiglu", 8192, 14336),
    losses.cross_entropy(8192, 128256),
    losses.fused_linear_cross_entropy(8192, 2048, 128256),
    losses.fused_linear_cross_entropy(8192, 2048, 128256, in_float32=False),
    losses.fused_linear_cross_entropy(16384, 4096, 128256),
    losses.fused_linear_cross_entropy(16384, 4096, 128256, in_float32=False),
    losses.scattermoe(16384, 2048, 64, 8, 1024),
    sequences.pack_sequence(32, 4096, 2048),
    sequences.pack_sequence(32, 4096, 2048, total=4096),
    sequences.recurrence("rnn", 8, 2048, 16, 64),
    sequences.recurrence("rnn", 4, 4096, 32, 64),
    sequences.recurrence("rnn", 8, 2048, 8, 128),
    sequences.recurrence("gru", 8, 2048, 16, 64),
    sequences.recurrence("gru", 4, 4096, 32, 64),
    sequences.linear_attention(4, 4096, 16, 128, 128, decay=False),
)

OTHERS = (
    sequences.linear_attention(4, 4096, 16, 128, 128, decay=True),
    sequences.gated_delta_rule(4, 4096, 16, 128, 128),
    sequences.mamba2_ssm(4, 4096, 64, 64, 128),
    sequences.causal_conv1d(4, 4096, 8192, 4),
    sequences.recurrence("lstm", 8, 2048, 16, 64),
    sequences.m2rnn(4, 2048, 16, 64, 64),
    sequences.unpack_sequence(32, 4096, 2048),
    rows.rmsnorm(16384, 768),
    rows.layernorm(16384, 4096),
    rows.gated_rmsnorm(16384, 4096),
    rows.p_norm(16384, 4096),
    rows.softmax(16384, 4096),
    rows.gated("swiglu", 16384, 14336),
    rows.gated("geglu", 8192, 14336),
    rows.swiglu_packed(8192, 14336, "interleaved"),
    rows.swiglu_packed(8192, 14336, "concatenated"),
    rows.relu_squared(8192, 14336),
    rows.rope(4, 4096, 32, 8, 128),
    rows.qk_norm_rope(4, 4096, 32, 8, 128),
    rows.attention(4, 4096, 32, 8, 128),
    losses.fused_linear_logprob(8192, 2048, 128256),
    losses.fused_linear_kl_div(8192, 2048, 128256),
    losses.fused_linear_topk_kl_div(8192, 2048, 128256, 64),
    losses.router_topk(32768, 128, 8),
    losses.sort_by_expert(32768, 8, 128),
    losses.continuous_count(262144, 128),
    optim.adamw(12, 768, 50257, torch.float32),
    optim.adamw(12, 768, 50257, torch.bfloat16),
    optim.adamw(16, 2048, 50257, torch.float32),
    optim.clip_grad_norm(12, 768, 50257, torch.float32, clip=False),
    optim.clip_grad_norm(12, 768, 50257, torch.float32, clip=True),
)

# Small enough for a CPU and for Triton's interpreter: it shows that the program works, no speed.
SMALL = (
    rows.rmsnorm(16, 64),
    rows.fused_residual_add_rmsnorm(16, 64),
    rows.layernorm(16, 64),
    rows.gated_rmsnorm(16, 64),
    rows.p_norm(16, 64),
    rows.softmax(16, 64),
    rows.gated("swiglu", 16, 64),
    rows.gated("geglu", 16, 64),
    rows.swiglu_packed(16, 64, "interleaved"),
    rows.relu_squared(16, 64),
    rows.rope(2, 16, 4, 2, 16),
    rows.qk_norm_rope(2, 16, 4, 2, 16),
    rows.attention(2, 16, 4, 2, 16),
    losses.cross_entropy(16, 96),
    losses.fused_linear_cross_entropy(16, 32, 96),
    losses.fused_linear_cross_entropy(16, 32, 96, in_float32=False),
    losses.fused_linear_logprob(16, 32, 96),
    losses.fused_linear_kl_div(16, 32, 96),
    losses.fused_linear_topk_kl_div(16, 32, 96, 4),
    losses.scattermoe(16, 32, 4, 2, 16),
    losses.router_topk(16, 8, 2),
    losses.sort_by_expert(16, 2, 4),
    losses.continuous_count(64, 8),
    sequences.pack_sequence(4, 16, 32),
    sequences.pack_sequence(4, 16, 32, total=24),
    sequences.unpack_sequence(4, 16, 32),
    sequences.causal_conv1d(2, 16, 32, 4),
    sequences.recurrence("rnn", 2, 8, 2, 16),
    sequences.recurrence("gru", 2, 8, 2, 16),
    sequences.recurrence("lstm", 2, 8, 2, 16),
    sequences.m2rnn(2, 8, 2, 16, 16),
    sequences.linear_attention(2, 64, 2, 16, 16, decay=False),
    sequences.linear_attention(2, 64, 2, 16, 16, decay=True),
    sequences.gated_delta_rule(2, 64, 2, 16, 16),
    sequences.mamba2_ssm(2, 64, 2, 16, 16),
    optim.adamw(1, 16, 32, torch.float32),
    optim.clip_grad_norm(1, 16, 32, torch.float32, clip=False),
    optim.clip_grad_norm(1, 16, 32, torch.float32, clip=True),
)

PRESETS: Mapping[str, tuple[Case, ...]] = {
    "goals": GOALS,
    "others": OTHERS,
    "full": (*GOALS, *OTHERS),
    "small": SMALL,
}
