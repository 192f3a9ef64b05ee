"""Squared rectifier in plain torch."""

from torch import Tensor
from torch.nn import functional as F

from lme_kernels.precision import compute_dtype


def relu_squared(x: Tensor) -> Tensor:
    return F.relu(x.to(compute_dtype(x.dtype))).square().to(x.dtype)
