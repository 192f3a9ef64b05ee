"""Calls of ops along sequences: packing, convolution and recurrences."""

import random
from itertools import pairwise

import torch

from lme_kernels.bench.calls import Call, Case, Cost, Draw

# Tokens multiplied at once, for the operations that chunked algorithms need.
CHUNK = 64


def _lengths(B: int, S: int, total: int | None) -> list[int]:
    """Lengths up to S, at random; or cut so that they add up to `total`."""
    generator = random.Random(0)
    if total is None:
        return [generator.randint(1, S) for _ in range(B)]
    cuts = [0, *sorted(generator.sample(range(1, total), B - 1)), total]
    return [end - start for start, end in pairwise(cuts)]


def pack_sequence(B: int, S: int, H: int, total: int | None = None) -> Case:
    """Tokens kept are read and written once; the backward writes the pads too."""
    lengths = _lengths(B, S, total)
    kept, length = sum(lengths), max(lengths)

    def make(draw: Draw) -> Call:
        row = H * draw.element
        return Call(
            (draw.normal(B, length, H), draw.offsets(lengths)),
            Cost(2 * kept * row, (kept + B * length) * row),
            options={"total_tokens": kept},
        )

    return Case("pack_sequence", f"{B} sequences up to {length}, {kept} tokens of {H}", make)


def unpack_sequence(B: int, S: int, H: int, total: int | None = None) -> Case:
    """The other way round."""
    lengths = _lengths(B, S, total)
    kept, length = sum(lengths), max(lengths)

    def make(draw: Draw) -> Call:
        row = H * draw.element
        return Call(
            (draw.normal(kept, H), draw.offsets(lengths)),
            Cost((kept + B * length) * row, 2 * kept * row),
            options={"batch_size": B, "max_seqlen": length},
        )

    return Case("unpack_sequence", f"{B} sequences up to {length}, {kept} tokens of {H}", make)


def causal_conv1d(B: int, S: int, C: int, W: int) -> Case:
    """With bias and SiLU, as mixers call it."""

    def make(draw: Draw) -> Call:
        elements = B * S * C * draw.element
        return Call(
            (draw.normal(B, S, C), draw.normal(C, W), draw.normal(C)),
            Cost(2 * elements, 3 * elements),
            options={"activation": "silu"},
        )

    return Case("causal_conv1d", f"B{B} S{S} C{C} W{W}", make)


# By op: inputs of the shape of `x`, each with a matrix.
GATES = {"rnn": 1, "gru": 3, "lstm": 4}


def recurrence(op: str, B: int, S: int, N: int, D: int) -> Case:
    """`rnn`, `gru` and `lstm`: inputs read and states written; all of them again backwards."""
    gates = GATES[op]

    def make(draw: Draw) -> Call:
        pairs = [
            each
            for _ in range(gates)
            for each in (draw.normal(B, S, N, D), draw.normal(N, D, D).mul_(D**-0.5))
        ]
        elements = B * S * N * D
        forward, backward = (gates + 1) * elements, (2 * gates + 1) * elements
        flops = 2.0 * gates * elements * D
        cost = Cost(forward * draw.element, backward * draw.element, flops, 2 * flops)
        return Call(tuple(pairs), cost)

    return Case(op, f"B{B} S{S} {N} heads of {D}", make)


def m2rnn(B: int, S: int, N: int, K: int, V: int) -> Case:
    """States are matrices of K by V."""

    def make(draw: Draw) -> Call:
        arguments = (
            draw.normal(B, S, N, K),
            draw.normal(B, S, N, K).mul_(K**-0.5),
            draw.normal(B, S, N, V),
            draw.normal(N, V, V).mul_(V**-0.5),
            draw.uniform(B, S, N),
        )
        tokens = B * S * N * draw.element
        flops = B * S * N * (2.0 * K * V * V + 4.0 * K * V)
        forward, backward = tokens * (2 * K + 2 * V + 1), tokens * (4 * K + 3 * V + 2)
        return Call(arguments, Cost(forward, backward, flops, 2 * flops))

    return Case("m2rnn", f"B{B} S{S} {N} heads {K}x{V}", make)


def _scan(draw: Draw, heads: int, K: int, V: int, keys: int, delta: bool = False) -> Cost:
    """Cost of chunked products; `keys` counts token-heads of keys and queries, `heads` values."""
    chunk = CHUNK * (K + V) * (2 if delta else 1)
    forward = (2 * keys * K + 2 * heads * V) * draw.element
    backward = (4 * keys * K + 3 * heads * V) * draw.element
    flops = heads * (4.0 * K * V + chunk)
    return Cost(forward, backward, flops, 2.5 * flops)


def linear_attention(B: int, S: int, N: int, K: int, V: int, decay: bool) -> Case:
    """With or without a decay a head."""

    def make(draw: Draw) -> Call:
        heads = B * S * N
        arguments = (
            draw.normal(B, S, N, K),
            draw.normal(B, S, N, K).mul_(K**-0.5),
            draw.normal(B, S, N, V),
        )
        options = {}
        if decay:
            gate = draw.normal(B, S, N, dtype=torch.float32)
            options["log_decay"] = torch.nn.functional.logsigmoid(gate + 3)
        return Call(arguments, _scan(draw, heads, K, V, heads), options=options)

    suffix = " decay" if decay else ""
    return Case("linear_attention", f"B{B} S{S} {N} heads {K}x{V}{suffix}", make)


def gated_delta_rule(B: int, S: int, N: int, K: int, V: int) -> Case:
    """Decay and strength a head, in float32."""

    def make(draw: Draw) -> Call:
        heads = B * S * N
        gate = draw.normal(B, S, N, dtype=torch.float32)
        arguments = (
            draw.normal(B, S, N, K),
            draw.normal(B, S, N, K),
            draw.normal(B, S, N, V),
            torch.nn.functional.logsigmoid(gate + 3),
            draw.normal(B, S, N, dtype=torch.float32).sigmoid(),
        )
        return Call(arguments, _scan(draw, heads, K, V, heads, delta=True))

    return Case("gated_delta_rule", f"B{B} S{S} {N} heads {K}x{V}", make)


def mamba2_ssm(B: int, S: int, N: int, P: int, n: int) -> Case:
    """One group of B and C for all heads."""

    def make(draw: Draw) -> Call:
        heads = B * S * N
        arguments = (
            draw.normal(B, S, N, P),
            torch.nn.functional.softplus(draw.normal(B, S, N, dtype=torch.float32) - 3),
            -draw.normal(N, dtype=torch.float32).exp(),
            draw.normal(B, S, 1, n),
            draw.normal(B, S, 1, n),
        )
        options = {"D": draw.normal(N, dtype=torch.float32)}
        return Call(arguments, _scan(draw, heads, n, P, B * S), options=options)

    return Case("mamba2_ssm", f"B{B} S{S} {N} heads of {P}, state {n}", make)
