"""Calls that update parameters in place: no gradient is taken of them."""

import torch

from lme_kernels.bench.calls import Call, Case, Cost, Draw


def _shapes(layers: int, H: int, vocabulary: int) -> list[tuple[int, ...]]:
    """Parameters of a decoder: an embedding, and per layer matrices and two norms."""
    layer = [(H,), (H, 3 * H), (H, H), (H,), (H, 8 * H), (4 * H, H)]
    return [(vocabulary, H), *(shape for _ in range(layers) for shape in layer), (H,)]


def _count(shapes: list[tuple[int, ...]]) -> int:
    return sum(torch.Size(shape).numel() for shape in shapes)


def adamw(layers: int, H: int, vocabulary: int, dtype: torch.dtype) -> Case:
    """One update of a decoder's parameters, moments in float32."""
    shapes = _shapes(layers, H, vocabulary)

    def make(draw: Draw) -> Call:
        parameters = [draw.normal(*shape, dtype=dtype).mul_(0.02) for shape in shapes]
        grads = [draw.normal(*shape, dtype=dtype).mul_(1e-3) for shape in shapes]
        # Parameter read and written, gradient read, two moments read and written.
        moved = _count(shapes) * (3 * dtype.itemsize + 16)
        return Call((parameters, grads), Cost(moved, 0.0))

    name = f"{_count(shapes) / 1e6:.0f}M parameters, {str(dtype).removeprefix('torch.')}"
    return Case("optim.adamw", name, make)


def clip_grad_norm(layers: int, H: int, vocabulary: int, dtype: torch.dtype, clip: bool) -> Case:
    """The norm of all gradients, and their scaling."""
    shapes = _shapes(layers, H, vocabulary)

    def make(draw: Draw) -> Call:
        grads = [draw.normal(*shape, dtype=dtype) for shape in shapes]
        return Call((grads,), Cost(_count(shapes) * dtype.itemsize * (3.0 if clip else 1.0), 0.0))

    name = f"{_count(shapes) / 1e6:.0f}M parameters, {str(dtype).removeprefix('torch.')}"
    return Case("optim.clip_grad_norm" if clip else "optim.grad_norm", name, make)
