"""Gated linear unit with the exact GELU in plain torch."""

from torch import Tensor
from torch.nn import functional as F

from lme_kernels.precision import compute_dtype


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    compute = compute_dtype(gate.dtype)
    return (F.gelu(gate.to(compute)) * up.to(compute)).to(gate.dtype)
