"""Root mean square normalisation in Pallas, for tensors on XLA devices."""

from torch import Tensor

from lme_kernels import pallas
from lme_kernels._pallas_torch import call, why_not

__all__ = ["rmsnorm", "why_not"]


def rmsnorm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    if weight is None:
        return call(_without_weight, {"x": x}, eps=eps)[0]
    return call(pallas.rmsnorm, {"x": x, "weight": weight}, eps=eps)[0]


def _without_weight(x, *, eps, interpret):
    return pallas.rmsnorm(x, None, eps=eps, interpret=interpret)
