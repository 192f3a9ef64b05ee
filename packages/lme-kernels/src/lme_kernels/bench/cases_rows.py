"""Calls of ops over rows, elements and heads."""

from lme_kernels.bench.calls import Call, Case, Cost, Draw


def _cost(draw: Draw, elements: float, forward: float, backward: float) -> Cost:
    return Cost(forward * elements * draw.element, backward * elements * draw.element)


def rmsnorm(R: int, H: int) -> Case:
    """Rows of `x`, read once each way."""

    def make(draw: Draw) -> Call:
        return Call(
            (draw.normal(R, H), draw.normal(H)), _cost(draw, R * H, 2, 3), options={"eps": 1e-6}
        )

    return Case("rmsnorm", f"{R}x{H}", make)


def fused_residual_add_rmsnorm(R: int, H: int) -> Case:
    """Two inputs and two outputs; one gradient serves both inputs."""

    def make(draw: Draw) -> Call:
        return Call(
            (draw.normal(R, H), draw.normal(R, H), draw.normal(H)),
            _cost(draw, R * H, 4, 4),
            options={"eps": 1e-6},
        )

    return Case("fused_residual_add_rmsnorm", f"{R}x{H}", make)


def layernorm(R: int, H: int) -> Case:
    """As `rmsnorm`."""

    def make(draw: Draw) -> Call:
        return Call(
            (draw.normal(R, H), draw.normal(H), draw.normal(H)),
            _cost(draw, R * H, 2, 3),
            options={"eps": 1e-5},
        )

    return Case("layernorm", f"{R}x{H}", make)


def gated_rmsnorm(R: int, H: int) -> Case:
    """Rows and gates."""

    def make(draw: Draw) -> Call:
        arguments = (draw.normal(R, H), draw.normal(R, H), draw.normal(H))
        return Call(arguments, _cost(draw, R * H, 3, 5))

    return Case("gated_rmsnorm", f"{R}x{H}", make)


def p_norm(R: int, H: int) -> Case:
    """As `rmsnorm`."""

    def make(draw: Draw) -> Call:
        return Call((draw.normal(R, H), draw.normal(H)), _cost(draw, R * H, 2, 3))

    return Case("p_norm", f"{R}x{H}", make)


def softmax(R: int, H: int) -> Case:
    """The backward reads the result and its gradient."""

    def make(draw: Draw) -> Call:
        return Call((draw.normal(R, H),), _cost(draw, R * H, 2, 3))

    return Case("softmax", f"{R}x{H}", make)


def gated(op: str, R: int, H: int) -> Case:
    """`swiglu` and `geglu`."""

    def make(draw: Draw) -> Call:
        return Call((draw.normal(R, H), draw.normal(R, H)), _cost(draw, R * H, 3, 5))

    return Case(op, f"{R}x{H}", make)


def swiglu_packed(R: int, H: int, layout: str) -> Case:
    """`H` outputs a row."""

    def make(draw: Draw) -> Call:
        return Call((draw.normal(R, 2 * H),), _cost(draw, R * H, 3, 5), options={"layout": layout})

    return Case("swiglu_packed", f"{R}x{H} {layout}", make)


def relu_squared(R: int, H: int) -> Case:
    """Elements."""

    def make(draw: Draw) -> Call:
        return Call((draw.normal(R, H),), _cost(draw, R * H, 2, 3))

    return Case("relu_squared", f"{R}x{H}", make)


def rope(B: int, S: int, N: int, K: int, D: int) -> Case:
    """Queries and keys, rotated and back."""

    def make(draw: Draw) -> Call:
        angle = draw.uniform(S, D // 2).float() * 6
        cos, sin = (each.repeat(1, 2).to(draw.dtype) for each in (angle.cos(), angle.sin()))
        return Call(
            (draw.normal(B, S, N, D), draw.normal(B, S, K, D), cos, sin),
            _cost(draw, B * S * (N + K) * D, 2, 2),
            constants=frozenset({2, 3}),
        )

    return Case("rope", f"B{B} S{S} {N}+{K} heads of {D}", make)


def qk_norm_rope(B: int, S: int, N: int, K: int, D: int) -> Case:
    """Normalised first."""

    def make(draw: Draw) -> Call:
        angle = draw.uniform(S, D // 2).float() * 6
        cos, sin = (each.repeat(1, 2).to(draw.dtype) for each in (angle.cos(), angle.sin()))
        heads = draw.normal(B, S, N, D), draw.normal(B, S, K, D)
        return Call(
            (*heads, draw.normal(D), draw.normal(D), cos, sin),
            _cost(draw, B * S * (N + K) * D, 2, 3),
            constants=frozenset({4, 5}),
        )

    return Case("qk_norm_rope", f"B{B} S{S} {N}+{K} heads of {D}", make)


def attention(B: int, S: int, N: int, K: int, D: int) -> Case:
    """Causal; of the products half counts."""

    def make(draw: Draw) -> Call:
        heads = (draw.normal(B, S, N, D), draw.normal(B, S, K, D), draw.normal(B, S, K, D))
        elements = B * S * (N + K) * D
        flops = 2.0 * B * N * S * S * D
        cost = Cost(2 * elements * draw.element, 4 * elements * draw.element, flops, 2.5 * flops)
        return Call(heads, cost)

    return Case("attention", f"B{B} S{S} {N}+{K} heads of {D}", make)
