"""Norm of gradients and clipping by it, without waiting for the device."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from lme_kernels.op import Backend, Op
from lme_kernels.optim import reference
from lme_kernels.optim.local import local

GRAD_NORM = Op(
    name="grad_norm",
    reference=reference.grad_norm,
    implementations={Backend.TRITON: "lme_kernels.optim._triton_norm"},
)
SCALE_BY_NORM = Op(
    name="scale_by_norm",
    reference=reference.scale_by_norm,
    implementations={Backend.TRITON: "lme_kernels.optim._triton_norm"},
)


def grad_norm(tensors: Iterable[Tensor], *, backend: Backend | str | None = None) -> Tensor:
    """Euclidean norm of all elements of some tensors together.

    Sums are taken in a fixed order: the same tensors give the same bits.

    Args:
        tensors: Tensors on one device, of any floating-point dtypes and shapes.
        backend: Implementation to run; `None` takes the fastest one proven for the device.

    Returns:
        0-d, at least float32, on that device; infinite or NaN if an element is, or the sum of
        squares overflows. Zero for no tensors.

    Raises:
        ValueError: If a tensor is a shard of a larger one: its norm is its ranks' business.
        UnsupportedBackendError: If `backend` is named and cannot serve the call.
    """
    given = list(tensors)
    if not given:
        return torch.zeros(())
    for each in given:
        if local(each) is not each:
            raise ValueError(
                "`grad_norm` takes local tensors, and one is distributed: reduce over its ranks, "
                "or give `to_local()` of each"
            )
    with torch.no_grad():
        return GRAD_NORM.choose(backend, *given)(given)


def clip_grad_norm_(
    parameters: Iterable[Tensor] | Tensor,
    max_norm: float,
    *,
    backend: Backend | str | None = None,
) -> Tensor:
    """Scale gradients in place so that their norm together is at most `max_norm`.

    Unlike `torch.nn.utils.clip_grad_norm_` it touches no gradient if the norm is small enough, nor
    if it is not finite: the caller sees that from the norm and leaves the step out.

    Args:
        parameters: Parameters, those without gradient left out.
        max_norm: The most the norm may be, above 0.
        backend: Implementation to run; `None` takes the fastest one proven for the device.

    Returns:
        The norm before, as `grad_norm` gives it.

    Raises:
        ValueError: If `max_norm` is not above 0, or a gradient is distributed.
        UnsupportedBackendError: If `backend` is named and cannot serve the call.
    """
    if not max_norm > 0:
        raise ValueError(f"`max_norm` must be above 0, got {max_norm}")
    listed: Iterable[Tensor] = [parameters] if isinstance(parameters, Tensor) else parameters
    grads = [each.grad for each in listed if each.grad is not None]
    norm = grad_norm(grads, backend=backend)
    if grads:
        _scale(grads, norm, max_norm, backend)
    return norm


def _scale(
    grads: Sequence[Tensor], norm: Tensor, max_norm: float, backend: Backend | str | None
) -> None:
    # Kernels write to contiguous memory in place; of the others there are few.
    whole = [each for each in grads if each.is_contiguous()]
    others = [each for each in grads if not each.is_contiguous()]
    with torch.no_grad():
        if whole:
            SCALE_BY_NORM.choose(backend, *whole)(whole, norm, max_norm)
        if others:
            reference.scale_by_norm(others, norm, max_norm)
