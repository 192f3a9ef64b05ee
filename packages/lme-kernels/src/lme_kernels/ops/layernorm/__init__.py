"""Layer normalisation."""

from torch import Tensor

from lme_kernels.op import Backend, Op
from lme_kernels.ops.layernorm import reference

LAYERNORM = Op(
    name="layernorm",
    reference=reference.layernorm,
    implementations={Backend.TRITON: "lme_kernels.ops.layernorm._triton"},
)


def layernorm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    eps: float = 1e-5,
    backend: Backend | str | None = None,
) -> Tensor:
    """Bring each row of `x` to mean zero and variance one, then scale and shift it.

    Args:
        x: Activations, shape (..., hidden).
        weight: Scale, shape (hidden,); `None` for no scale.
        bias: Shift, shape (hidden,); `None` for no shift.
        eps: Added to the (biased) variance, in units of `x` squared.
        backend: Implementation to run; `None` takes the fastest one proven for `x`'s device.

    Returns:
        Shape (..., hidden), dtype of `x`; computed in at least float32 and rounded once.

    Raises:
        ValueError: If `weight` or `bias` does not have shape (hidden,).
        UnsupportedBackendError: If `backend` is named and cannot serve the call.

    Source: Ba, Kiros and Hinton 2016, equation 3 (arXiv:1607.06450).
    """
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None and parameter.shape != x.shape[-1:]:
            expected, got = tuple(x.shape[-1:]), tuple(parameter.shape)
            raise ValueError(f"`{name}` must have shape {expected} to match `x`, got {got}")
    return LAYERNORM.choose(backend, x, weight, bias)(x, weight, bias, eps)
