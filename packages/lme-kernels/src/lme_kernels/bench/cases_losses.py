"""Calls of losses and of the mixture of experts."""

import torch
from torch import Tensor

from lme_kernels.bench.calls import Call, Case, Cost, Draw


def cross_entropy(T: int, V: int) -> Case:
    """Logits read once and their gradient written once."""

    def make(draw: Draw) -> Call:
        logits = T * V * draw.element
        return Call((draw.normal(T, V), draw.integers(V, T)), Cost(logits, logits))

    return Case("cross_entropy", f"{T}x{V}", make)


def _linear(draw: Draw, T: int, H: int, V: int, teacher_flops: float = 0.0) -> Cost:
    operands = (T * H + V * H) * draw.element
    product = 2.0 * T * H * V
    return Cost(operands, 2 * operands, product + teacher_flops, 2 * product)


def _operands(draw: Draw, T: int, H: int, V: int) -> tuple[Tensor, Tensor]:
    # Of the size of trained weights, so that logits are of the order of one.
    return draw.normal(T, H), draw.normal(V, H).mul_(H**-0.5)


def fused_linear_cross_entropy(T: int, H: int, V: int, in_float32: bool = True) -> Case:
    """Three products of T, H and V."""

    def make(draw: Draw) -> Call:
        return Call(
            (*_operands(draw, T, H, V), draw.integers(V, T)),
            _linear(draw, T, H, V),
            options={"grad_accum_dtype": torch.float32 if in_float32 else None},
        )

    suffix = "" if in_float32 else " dW in the weight's dtype"
    return Case("fused_linear_cross_entropy", f"{T}x{H}x{V}{suffix}", make)


def fused_linear_logprob(T: int, H: int, V: int) -> Case:
    """As the cross-entropy."""

    def make(draw: Draw) -> Call:
        return Call((*_operands(draw, T, H, V), draw.integers(V, T)), _linear(draw, T, H, V))

    return Case("fused_linear_logprob", f"{T}x{H}x{V}", make)


def fused_linear_kl_div(T: int, H: int, V: int) -> Case:
    """One product more, the teacher's."""

    def make(draw: Draw) -> Call:
        return Call(
            (*_operands(draw, T, H, V), *_operands(draw, T, H, V)),
            _linear(draw, T, H, V, 2.0 * T * H * V),
            constants=frozenset({2, 3}),
        )

    return Case("fused_linear_kl_div", f"{T}x{H}x{V}", make)


def fused_linear_topk_kl_div(T: int, H: int, V: int, K: int) -> Case:
    """A teacher known at K classes."""

    def make(draw: Draw) -> Call:
        # Distinct within a row: every class is from a stretch of its own.
        stretch = V // K
        classes = draw.integers(stretch, T, K) + stretch * torch.arange(K, device=draw.device)
        logprob = draw.normal(T, K, dtype=torch.float32).log_softmax(-1) - 0.1
        return Call(
            (*_operands(draw, T, H, V), classes, logprob),
            _linear(draw, T, H, V),
            constants=frozenset({3}),
        )

    return Case("fused_linear_topk_kl_div", f"{T}x{H}x{V} top {K}", make)


def scattermoe(T: int, H: int, E: int, k: int, width: int) -> Case:
    """Experts chosen at random, gated."""

    def make(draw: Draw) -> Call:
        arguments = (
            draw.normal(T, H),
            draw.uniform(T, k),
            draw.choices(T, k, E),
            draw.normal(E, 2 * width, H).mul_(H**-0.5),
            draw.normal(E, H, width).mul_(width**-0.5),
        )
        weights, tokens = 3 * E * H * width * draw.element, T * H * draw.element
        flops = 6.0 * T * k * H * width
        cost = Cost(weights + 2 * tokens, 2 * weights + 3 * tokens, flops, 2 * flops)
        return Call(arguments, cost)

    return Case("scattermoe", f"T{T} H{H} E{E} top {k} I{width}", make)


def router_topk(T: int, E: int, k: int) -> Case:
    """Logits in, weights and experts out."""

    def make(draw: Draw) -> Call:
        logits, chosen = T * E * draw.element, T * k
        forward = logits + chosen * (draw.element + 8)
        backward = 2 * logits + chosen * (draw.element + 8)
        return Call((draw.normal(T, E), k), Cost(forward, backward))

    return Case("router_topk", f"T{T} E{E} top {k}", make)


def sort_by_expert(T: int, k: int, E: int) -> Case:
    """Entries in, order and its inverse out."""

    def make(draw: Draw) -> Call:
        return Call((draw.choices(T, k, E), E), Cost(16.0 * T * k, 0.0))

    return Case("sort_by_expert", f"T{T} top {k} E{E}", make)


def continuous_count(entries: int, bins: int) -> Case:
    """Entries in, counts out."""

    def make(draw: Draw) -> Call:
        return Call((draw.integers(bins, entries), bins), Cost(8.0 * entries, 0.0))

    return Case("continuous_count", f"{entries} into {bins}", make)
