"""Mixture of experts in plain torch: a loop over the experts."""

import torch
from torch import Tensor
from torch.nn import functional as F

from lme_kernels.ops.scattermoe.activations import Activation, activate
from lme_kernels.precision import compute_dtype


def scattermoe(
    x: Tensor,
    weights: Tensor,
    indices: Tensor,
    up: Tensor,
    down: Tensor,
    activation: Activation,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
) -> Tensor:
    if x.is_cpu and not torch.compiler.is_compiling():
        return _by_expert(x, weights, indices, up, down, activation, up_bias, down_bias)
    # Every expert sees every token: more work, and no shape depends on the indices.
    factors = weights.to(compute_dtype(x.dtype))
    total = torch.zeros_like(x, dtype=factors.dtype)
    for expert in range(up.shape[0]):
        y = _expert(x, expert, up, down, activation, up_bias, down_bias)
        factor = torch.where(indices == expert, factors, 0.0).sum(-1, keepdim=True)
        total = total + factor * y.to(factors.dtype)
    return total.to(x.dtype)


def _by_expert(x, weights, indices, up, down, activation, up_bias, down_bias):
    (T, k), E = indices.shape, up.shape[0]
    compute = compute_dtype(x.dtype)
    experts = indices.reshape(-1)
    order = torch.argsort(experts, stable=True)
    counts = torch.bincount(experts, minlength=E).tolist()
    # Gradients of a token are added up before they are rounded.
    wide = x.to(compute)
    parts = [
        _expert(wide[entries // k].to(x.dtype), expert, up, down, activation, up_bias, down_bias)
        for expert, entries in enumerate(order.split(counts))
    ]
    position = torch.empty_like(order).scatter(0, order, torch.arange(T * k))
    y = torch.cat(parts)[position].reshape(T, k, x.shape[1])
    return (weights.to(compute)[..., None] * y.to(compute)).sum(1).to(x.dtype)


def _expert(x, expert, up, down, activation, up_bias, down_bias):
    h = F.linear(x, up[expert], None if up_bias is None else up_bias[expert])
    y = activate(h, activation)
    return F.linear(y, down[expert], None if down_bias is None else down_bias[expert])
