"""Gated linear unit with SiLU in plain torch."""

from torch import Tensor
from torch.nn import functional as F

from lme_kernels.precision import compute_dtype


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    compute = compute_dtype(gate.dtype)
    return (F.silu(gate.to(compute)) * up.to(compute)).to(gate.dtype)
