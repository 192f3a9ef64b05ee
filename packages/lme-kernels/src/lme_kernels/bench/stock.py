"""What a user of plain torch writes instead of an op: the columns `eager` and `compile`."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def _rmsnorm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def _fused_residual_add_rmsnorm(
    x: Tensor, residual: Tensor, weight: Tensor, *, eps: float
) -> tuple[Tensor, Tensor]:
    total = residual + x
    return F.rms_norm(total, x.shape[-1:], weight, eps), total


def _layernorm(x: Tensor, weight: Tensor, bias: Tensor, *, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def _gated_rmsnorm(x: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x * F.silu(gate), x.shape[-1:], weight, 1e-6)


def _p_norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.normalize(x, p=2.0, dim=-1, eps=1e-6) * weight


def _softmax(x: Tensor) -> Tensor:
    return F.softmax(x, dim=-1)


def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def _geglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.gelu(gate) * up


def _swiglu_packed(x: Tensor, *, layout: str) -> Tensor:
    gate, up = (x[..., ::2], x[..., 1::2]) if layout == "interleaved" else x.chunk(2, -1)
    return F.silu(gate) * up


def _relu_squared(x: Tensor) -> Tensor:
    return F.relu(x).square()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def _rope(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = cos[:, None], sin[:, None]
    return _rotate(query, cos, sin), _rotate(key, cos, sin)


def _qk_norm_rope(
    query: Tensor,
    key: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
) -> tuple[Tensor, Tensor]:
    D = query.shape[-1:]
    query, key = F.rms_norm(query, D, query_weight, 1e-6), F.rms_norm(key, D, key_weight, 1e-6)
    return _rope(query, key, cos, sin)


def _attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    q, k, v = (each.transpose(1, 2) for each in (query, key, value))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return y.transpose(1, 2)


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    # As trainers do: the loss is taken of float32 logits.
    return F.cross_entropy(logits.float(), labels)


def _fused_linear_cross_entropy(
    x: Tensor, weight: Tensor, labels: Tensor, *, grad_accum_dtype: torch.dtype | None
) -> Tensor:
    del grad_accum_dtype
    return F.cross_entropy(F.linear(x, weight).float(), labels)


def _fused_linear_logprob(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logprob = F.log_softmax(F.linear(x, weight).float(), -1)
    return logprob.gather(-1, labels[:, None]).squeeze(-1)


def _fused_linear_kl_div(
    x: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor
) -> Tensor:
    p = F.log_softmax(F.linear(x, weight).float(), -1)
    q = F.log_softmax(F.linear(teacher, teacher_weight).float(), -1)
    return F.kl_div(q, p, reduction="batchmean", log_target=True)


def _router_topk(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    values, indices = logits.topk(k, -1)
    return F.softmax(values, -1, dtype=torch.float32).to(logits.dtype), indices


def _sort_by_expert(indices: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    flat = indices.reshape(-1)
    order = flat.argsort(stable=True)
    ends = flat.bincount(minlength=num_experts).cumsum(0)
    return order.int(), ends.int(), order.argsort().int()


def _continuous_count(x: Tensor, bins: int) -> Tensor:
    return x.bincount(minlength=bins).int()


def _scattermoe(x: Tensor, weights: Tensor, indices: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Sort, two grouped products, and a sum a token; gates and ups interleaved as in the op."""
    E, k = up.shape[0], indices.shape[1]
    flat = indices.reshape(-1)
    order = flat.argsort(stable=True)
    ends = F.one_hot(flat, E).sum(0).cumsum(0).to(torch.int32)
    h = F.grouped_mm(x[order // k], up.transpose(-2, -1), offs=ends)
    h = F.silu(h[:, ::2]) * h[:, 1::2]
    y = F.grouped_mm(h, down.transpose(-2, -1), offs=ends)
    y = y * weights.reshape(-1)[order][:, None]
    return torch.zeros_like(x).index_add(0, order // k, y)


def _causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor, *, activation: str) -> Tensor:
    del activation
    C, W = weight.shape
    channels = x.transpose(1, 2)
    y = F.conv1d(channels, weight[:, None], bias, padding=W - 1, groups=C)
    return F.silu(y[..., : x.shape[1]]).transpose(1, 2)


STOCK: Mapping[str, Callable[..., Any]] = {
    "rmsnorm": _rmsnorm,
    "fused_residual_add_rmsnorm": _fused_residual_add_rmsnorm,
    "layernorm": _layernorm,
    "gated_rmsnorm": _gated_rmsnorm,
    "p_norm": _p_norm,
    "softmax": _softmax,
    "swiglu": _swiglu,
    "geglu": _geglu,
    "swiglu_packed": _swiglu_packed,
    "relu_squared": _relu_squared,
    "rope": _rope,
    "qk_norm_rope": _qk_norm_rope,
    "attention": _attention,
    "cross_entropy": _cross_entropy,
    "fused_linear_cross_entropy": _fused_linear_cross_entropy,
    "fused_linear_logprob": _fused_linear_logprob,
    "fused_linear_kl_div": _fused_linear_kl_div,
    "router_topk": _router_topk,
    "sort_by_expert": _sort_by_expert,
    "continuous_count": _continuous_count,
    "scattermoe": _scattermoe,
    "causal_conv1d": _causal_conv1d,
}
"""By op, a function with the arguments of its calls here."""

# Ops whose torch reference is worth compiling: it has no loop over tokens.
COMPILED_REFERENCES = frozenset({"pack_sequence", "unpack_sequence"})
