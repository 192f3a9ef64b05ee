"""Spellings of kernels: the names of ops, and what other systems call them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

NAMES: tuple[str, ...] = (
    # An optimizer's update.
    "adamw",
    "attention",
    "causal_conv1d",
    "continuous_count",
    "cross_entropy",
    "fused_linear_cross_entropy",
    "fused_linear_kl_div",
    "fused_linear_logprob",
    "fused_linear_topk_kl_div",
    "fused_residual_add_rmsnorm",
    "gated_delta_rule",
    "gated_rmsnorm",
    "geglu",
    "gru",
    "layernorm",
    "linear_attention",
    "lstm",
    "m2rnn",
    "mamba2_ssm",
    "p_norm",
    "pack_sequence",
    "qk_norm_rope",
    "relu_squared",
    "rmsnorm",
    "rnn",
    "rope",
    "router_topk",
    "scattermoe",
    "softmax",
    "sort_by_expert",
    "swiglu",
    "swiglu_packed",
    "unpack_sequence",
)

BACKENDS: tuple[str, ...] = (
    "torch",
    "triton",
    "cuda",
    "pallas",
    "nki",
    # Those of `attention`.
    "sdpa",
    "cudnn",
    "flash",
    "efficient",
    "flash_varlen",
    "flex",
    "flash_attention_2",
    "flash_attention_3",
    "flash_attention_4",
)


@dataclass(frozen=True, slots=True)
class Target:
    """What one spelling asks for."""

    op: str | None
    """Name of the op; `None` if no op of ours corresponds to it."""
    backend: str | None = None
    """Backend it names; `None` for the fastest."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments it fixes."""
    note: str | None = None
    """Why it has no effect, where it has none."""


_PLAIN_PRODUCT = "matrix products outside the losses and the experts are torch's own"
_DETERMINISTIC = MappingProxyType({"deterministic": True})

ALIASES: Mapping[str, tuple[Target, ...]] = MappingProxyType(
    {
        # A model's gated MLP holds gate and up in one tensor; the run file says `swiglu`.
        "swiglu": (Target("swiglu"), Target("swiglu_packed")),
        # Our rmsnorm always recomputes the normalised activations.
        "rmsnorm_memory_efficient": (Target("rmsnorm"),),
        "quack_rmsnorm": (Target("rmsnorm"),),
        "quack_gemm": (Target(None, note=_PLAIN_PRODUCT),),
        "quack_gemm_act": (Target(None, note=_PLAIN_PRODUCT),),
        "quack_gemm_gated": (Target(None, note=f"{_PLAIN_PRODUCT}; `swiglu_packed` is fused"),),
        "coda_linear_swiglu": (Target(None, note=f"{_PLAIN_PRODUCT}; `swiglu_packed` is fused"),),
        "coda_linear_cross_entropy": (Target("fused_linear_cross_entropy"),),
        "sonicmoe": (Target("scattermoe"),),
        "flash_attention_2": (Target("attention", "flash_attention_2"),),
        "flash_attention_3": (Target("attention", "flash_attention_3"),),
        "flash_attention_4": (Target("attention", "flash_attention_4"),),
        "flash_attention_2_deterministic": (
            Target("attention", "flash_attention_2", _DETERMINISTIC),
        ),
        "flash_attention_3_deterministic": (
            Target("attention", "flash_attention_3", _DETERMINISTIC),
        ),
        "flash_attention_4_deterministic": (
            Target("attention", "flash_attention_4", _DETERMINISTIC),
        ),
        "rms_norm": (Target("rmsnorm"),),
        "layer_norm": (Target("layernorm"),),
        "gated_rms_norm": (Target("gated_rmsnorm"),),
        "add_rms_norm": (Target("fused_residual_add_rmsnorm"),),
        "relu2": (Target("relu_squared"),),
        "linear_cross_entropy": (Target("fused_linear_cross_entropy"),),
        "linear_kl_div": (Target("fused_linear_kl_div"),),
        "linear_topk_kl_div": (Target("fused_linear_topk_kl_div"),),
        "linear_logprob": (Target("fused_linear_logprob"),),
        "bincount": (Target("continuous_count"),),
        "expert_histogram": (Target("continuous_count"),),
        "moe_router_topk": (Target("router_topk"),),
        "moe_mlp": (Target("scattermoe"),),
        "matrix_rnn": (Target("m2rnn"),),
        "ssd": (Target("mamba2_ssm"),),
    }
)
