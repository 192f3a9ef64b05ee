"""Mixture of experts: each token goes through the few MLPs that were chosen for it."""

from typing import Literal

import torch
from torch import Tensor

from lme_kernels.op import Backend, Op
from lme_kernels.ops.scattermoe import reference
from lme_kernels.ops.scattermoe.activations import ACTIVATIONS

SCATTERMOE = Op(
    name="scattermoe",
    reference=reference.scattermoe,
    implementations={Backend.TRITON: "lme_kernels.ops.scattermoe._triton"},
)

Layout = Literal["interleaved", "concatenated"]


def scattermoe(
    x: Tensor,
    weights: Tensor,
    indices: Tensor,
    up: Tensor,
    down: Tensor,
    *,
    activation: str = "swiglu",
    layout: Layout = "interleaved",
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    backend: Backend | str | None = None,
) -> Tensor:
    """Add up the outputs of each token's experts: `sum_j weights[j] * expert[indices[j]](x)`.

    No token is dropped and no expert is padded. The fused implementation sorts the choices by
    expert on the device, and keeps for its backward only the arguments, the sorted order and the
    pre-activations.

    Args:
        x: Tokens, shape (T, H).
        weights: Weight of each choice, shape (T, k), of any floating-point dtype.
        indices: Chosen experts, shape (T, k), int32 or int64, from 0 to E - 1, which no device
            checks.
        up: First weights of the experts, shape (E, U, H), dtype of `x`: U is 2 * I for a gated
            activation, else I.
        down: Second weights of the experts, shape (E, H, I), dtype of `x`.
        activation: A key of `lme_kernels.ops.scattermoe.activations.ACTIVATIONS`; those that end in
            "glu" are gated.
        layout: Which rows of `up` are gates: "interleaved" the even ones, "concatenated" the first
            half, for which the fused implementation makes an interleaved copy in every call.
        up_bias: Shape (E, U); `None` for none.
        down_bias: Shape (E, H); `None` for none.
        backend: Implementation to run; `None` takes the fastest one proven for `x`'s device.

    Returns:
        Shape (T, H), dtype of `x`. Pre-activations, activations and the outputs of experts are
        rounded to the dtype of `x`; their weighted sum is taken in at least float32.

    Raises:
        ValueError: If a shape or dtype does not fit, or there is no such activation or layout.
        UnsupportedBackendError: If `backend` is named and cannot serve the call.

    Source: Shazeer et al. 2017, equation 1 (arXiv:1701.06538).
    """
    if activation not in ACTIVATIONS:
        known = ", ".join(f'"{each}"' for each in ACTIVATIONS)
        raise ValueError(f"`activation` must be one of {known}, got {activation!r}")
    if layout not in ("interleaved", "concatenated"):
        raise ValueError(f'`layout` must be "interleaved" or "concatenated", got {layout!r}')
    chosen = ACTIVATIONS[activation]
    _check(x, weights, indices, up, down, 2 if chosen.gated else 1, up_bias, down_bias)
    if chosen.gated and layout == "concatenated":
        up = _interleave(up)
        up_bias = None if up_bias is None else _interleave(up_bias)
    function = SCATTERMOE.choose(backend, x, weights, up, down, up_bias, down_bias)
    return function(x, weights, indices, up, down, chosen, up_bias, down_bias)


def _interleave(up: Tensor) -> Tensor:
    gate, value = up.chunk(2, dim=1)
    return torch.stack((gate, value), dim=2).flatten(1, 2)


def _check(
    x: Tensor,
    weights: Tensor,
    indices: Tensor,
    up: Tensor,
    down: Tensor,
    rows: int,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
) -> None:
    if x.ndim != 2 or up.ndim != 3 or down.ndim != 3:
        raise ValueError(
            f"`x`, `up` and `down` must have shapes (T, H), (E, U, H) and (E, H, I), got "
            f"{tuple(x.shape)}, {tuple(up.shape)} and {tuple(down.shape)}"
        )
    (T, H), (E, _, width) = x.shape, down.shape
    expected = {
        "up": (up, (E, rows * width, H)),
        "down": (down, (E, H, width)),
        "indices": (indices, (T, indices.shape[-1])),
        "weights": (weights, tuple(indices.shape)),
        "up_bias": (up_bias, (E, rows * width)),
        "down_bias": (down_bias, (E, H)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"`{name}` must have shape {shape}, got {tuple(tensor.shape)}")
    for name, tensor in (("up", up), ("down", down)):
        if tensor.dtype != x.dtype:
            raise ValueError(f"`{name}` must have the dtype {x.dtype} of `x`, got {tensor.dtype}")
    if indices.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"`indices` must be int32 or int64, got {indices.dtype}")
