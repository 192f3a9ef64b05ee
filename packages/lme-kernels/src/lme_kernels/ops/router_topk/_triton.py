"""Choice of experts in Triton: a token's scores stay in registers."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from lme_kernels._triton_launch import thin_launch
from lme_kernels._triton_rows import as_rows, num_rows
from lme_kernels.custom_ops import define
from lme_kernels.device import why_not_triton
from lme_kernels.ops.router_topk.reference import TINY
from lme_kernels.tuning import next_power_of_two

ELEMENTS = 2048
MAX_EXPERTS = 4096


def why_not(logits: Tensor, bias: Tensor | None) -> str | None:
    if logits.shape[-1] > MAX_EXPERTS:
        return f"there are {logits.shape[-1]} experts, and it takes at most {MAX_EXPERTS}"
    return why_not_triton(logits, bias)


def router_topk(
    logits: Tensor, k: int, score: str, normalize: bool, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    return _RouterTopK.apply(logits, k, score == "sigmoid", normalize, bias)


class _RouterTopK(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, k, sigmoid, normalize, bias):
        weights, indices = _forward(logits, k, sigmoid, normalize, bias)
        ctx.save_for_backward(logits, indices)
        ctx.sigmoid, ctx.normalize = sigmoid, normalize
        ctx.mark_non_differentiable(indices)
        return weights, indices

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_weights, _grad_indices):
        logits, indices = ctx.saved_tensors
        grad = _backward(grad_weights, logits, indices, ctx.sigmoid, ctx.normalize)
        return grad, None, None, None, None


@triton.jit
def _scores(x, SIGMOID: tl.constexpr):
    """Scores of all experts, of logits that are minus infinity where there is none."""
    if SIGMOID:
        scores = tl.sigmoid(x)
    else:
        scores = tl.exp(x - tl.max(x, axis=1, keep_dims=True))
        scores = scores / tl.sum(scores, axis=1, keep_dims=True)
    return scores


@triton.jit
def _weights(chosen, exists, SIGMOID: tl.constexpr, NORMALIZE: tl.constexpr, TINY: tl.constexpr):
    """Weights of chosen logits (softmax, normalised) or chosen scores (else)."""
    weights = chosen
    if NORMALIZE:
        if SIGMOID:
            total = tl.sum(tl.where(exists, chosen, 0.0), axis=1, keep_dims=True)
            weights = chosen / (total + TINY)
        else:
            chosen = tl.where(exists, chosen, float("-inf"))
            weights = tl.exp(chosen - tl.max(chosen, axis=1, keep_dims=True))
            weights = weights / tl.sum(weights, axis=1, keep_dims=True)
    return weights


@thin_launch
@triton.jit(do_not_specialize=["tokens"])
def _forward_kernel(
    logits_ptr,
    bias_ptr,
    weights_ptr,
    indices_ptr,
    stride,
    tokens,
    experts,
    K: tl.constexpr,
    SIGMOID: tl.constexpr,
    NORMALIZE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    TINY: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    token = (tl.program_id(0).to(tl.int64) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS))[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    mask = (token < tokens) & (column < experts)
    x = tl.load(logits_ptr + token * stride + column, mask=mask, other=float("-inf"))
    # A program's last rows may be past the end; zeros keep their sums finite.
    x = tl.where(token < tokens, x.to(tl.float32), 0.0)
    x = tl.where(column < experts, x, float("-inf"))
    scores = _scores(x, SIGMOID)
    values = x if NORMALIZE and not SIGMOID else scores
    if HAS_BIAS:
        bias = tl.load(bias_ptr + column, mask=column < experts, other=0.0).to(tl.float32)
        rank_by = scores + bias
    else:
        rank_by = x
    free = (column < experts) & (token < token + 1)
    slot = tl.arange(0, BLOCK_K)[None, :]
    chosen = tl.zeros((BLOCK_TOKENS, BLOCK_K), dtype=tl.float32)
    indices = tl.zeros((BLOCK_TOKENS, BLOCK_K), dtype=tl.int32)
    for place in tl.static_range(K):
        rest = tl.where(free, rank_by, float("-inf"))
        best = tl.max(rest, axis=1, keep_dims=True)
        # The lowest of the best; the last expert where a NaN leaves none.
        candidates = tl.where(free & (rest == best), column, experts - 1)
        index = tl.min(candidates, axis=1, keep_dims=True)
        value = tl.sum(tl.where(column == index, values, 0.0), axis=1, keep_dims=True)
        chosen = tl.where(slot == place, value, chosen)
        indices = tl.where(slot == place, index, indices)
        free = free & (column != index)
    weights = _weights(chosen, slot < K, SIGMOID, NORMALIZE, TINY)
    target = token * K + slot
    tl.store(weights_ptr + target, weights, mask=(token < tokens) & (slot < K))
    tl.store(indices_ptr + target, indices.to(tl.int64), mask=(token < tokens) & (slot < K))


@thin_launch
@triton.jit(do_not_specialize=["tokens"])
def _backward_kernel(
    grad_ptr,
    logits_ptr,
    indices_ptr,
    grad_logits_ptr,
    stride,
    tokens,
    experts,
    K: tl.constexpr,
    SIGMOID: tl.constexpr,
    NORMALIZE: tl.constexpr,
    TINY: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    token = (tl.program_id(0).to(tl.int64) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS))[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    slot = tl.arange(0, BLOCK_K)[None, :]
    mask = (token < tokens) & (column < experts)
    x = tl.load(logits_ptr + token * stride + column, mask=mask, other=float("-inf"))
    x = tl.where(token < tokens, x.to(tl.float32), 0.0)
    x = tl.where(column < experts, x, float("-inf"))
    scores = _scores(x, SIGMOID)
    values = x if NORMALIZE and not SIGMOID else scores
    chosen = tl.zeros((BLOCK_TOKENS, BLOCK_K), dtype=tl.float32)
    for place in tl.static_range(K):
        index = tl.load(indices_ptr + token * K + place, mask=token < tokens, other=0)
        value = tl.sum(tl.where(column == index, values, 0.0), axis=1, keep_dims=True)
        chosen = tl.where(slot == place, value, chosen)
    exists = (token < tokens) & (slot < K)
    grad = tl.load(grad_ptr + token * K + slot, mask=exists, other=0.0).to(tl.float32)
    if NORMALIZE:
        weights = _weights(chosen, slot < K, SIGMOID, NORMALIZE, TINY)
        grad = grad - tl.sum(weights * grad, axis=1, keep_dims=True)
        if SIGMOID:
            total = tl.sum(tl.where(slot < K, chosen, 0.0), axis=1, keep_dims=True)
            grad = grad / (total + TINY)
        else:
            grad = grad * weights
    # Gradient of the chosen values, in the columns of their experts.
    spread = tl.zeros((BLOCK_TOKENS, BLOCK), dtype=tl.float32)
    for place in tl.static_range(K):
        index = tl.load(indices_ptr + token * K + place, mask=token < tokens, other=0)
        value = tl.sum(tl.where(slot == place, grad, 0.0), axis=1, keep_dims=True)
        spread = tl.where(column == index, value, spread)
    if SIGMOID:
        spread = spread * scores * (1.0 - scores)
    elif not NORMALIZE:
        spread = scores * (spread - tl.sum(scores * spread, axis=1, keep_dims=True))
    tl.store(grad_logits_ptr + token * experts + column, spread, mask=mask)


def _shape(tokens, experts, k):
    block = max(16, next_power_of_two(experts))
    block_tokens = max(1, min(ELEMENTS // block, next_power_of_two(tokens)))
    return (triton.cdiv(tokens, block_tokens),), {
        "BLOCK_TOKENS": block_tokens,
        "BLOCK": block,
        "BLOCK_K": next_power_of_two(k),
        "TINY": TINY,
        "num_warps": 4 if block_tokens * block <= ELEMENTS else 8,
    }


def _forward_fake(logits, k, sigmoid, normalize, bias):
    shape = (*logits.shape[:-1], k)
    return logits.new_empty(shape), logits.new_empty(shape, dtype=torch.int64)


@define(
    "router_topk_forward(Tensor logits, int k, bool sigmoid, bool normalize, Tensor? bias) -> "
    "(Tensor, Tensor)",
    _forward_fake,
)
def _forward(logits, k, sigmoid, normalize, bias):
    weights, indices = _forward_fake(logits, k, sigmoid, normalize, bias)
    if logits.numel() == 0:
        return weights, indices
    logits, stride = as_rows(logits)
    tokens, experts = num_rows(logits), logits.shape[-1]
    grid, settings = _shape(tokens, experts, k)
    _forward_kernel[grid](
        logits,
        None if bias is None else bias.contiguous(),
        weights,
        indices,
        stride,
        tokens,
        experts,
        K=k,
        SIGMOID=sigmoid,
        NORMALIZE=normalize,
        HAS_BIAS=bias is not None,
        **settings,
    )
    return weights, indices


def _backward_fake(grad_weights, logits, indices, sigmoid, normalize):
    return logits.new_empty(logits.shape)


@define(
    "router_topk_backward(Tensor grad_weights, Tensor logits, Tensor indices, bool sigmoid, "
    "bool normalize) -> Tensor",
    _backward_fake,
)
def _backward(grad_weights, logits, indices, sigmoid, normalize):
    grad_logits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    if logits.numel() == 0:
        return grad_logits
    logits, stride = as_rows(logits)
    tokens, experts, k = num_rows(logits), logits.shape[-1], indices.shape[-1]
    grid, settings = _shape(tokens, experts, k)
    _backward_kernel[grid](
        grad_weights.contiguous(),
        logits,
        indices,
        grad_logits,
        stride,
        tokens,
        experts,
        K=k,
        SIGMOID=sigmoid,
        NORMALIZE=normalize,
        **settings,
    )
    return grad_logits
