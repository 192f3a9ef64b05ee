"""Updates and norms in plain torch, one tensor after the other."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lme_kernels.optim.batch import AdamWBatch, AdamWSettings
from lme_kernels.optim.philox import element_bits, round_stochastically
from lme_kernels.precision import compute_dtype


def adamw(batch: AdamWBatch, settings: AdamWSettings) -> None:
    """Update parameters in place, by the operations of `torch.optim.AdamW` in their order.

    Args:
        batch: What to update.
        settings: How.
    """
    if settings.found_inf is not None and bool(settings.found_inf):
        return
    for index, parameter in enumerate(batch.parameters):
        step = batch.steps[index]
        step += 1
        grad = batch.grads[index].to(batch.exp_avgs[index].dtype)
        if settings.grad_scale is not None:
            grad = grad / settings.grad_scale
        if settings.maximize:
            grad = -grad
        value = parameter.to(compute_dtype(parameter.dtype))
        _update(value, grad, batch.exp_avgs[index], batch.exp_avg_sqs[index], step, settings)
        if value is parameter:
            continue
        if settings.stochastic_rounding and parameter.dtype == torch.bfloat16:
            bits = element_bits(
                parameter.numel(),
                seed=settings.seed,
                parameter=batch.indices[index],
                step=int(step),
                device=parameter.device,
            )
            value = round_stochastically(value, bits)
        parameter.copy_(value)


def _update(
    value: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    settings: AdamWSettings,
) -> None:
    beta1, beta2 = settings.betas
    # In float64, on the host if the step is there, else on the device, which nobody waits for.
    count = float(step) if step.is_cpu else step.double()
    lr = settings.lr
    if isinstance(lr, Tensor):
        lr = float(lr) if lr.is_cpu else lr.double()
    bias_correction1 = 1 - beta1**count
    bias_correction2_sqrt = (1 - beta2**count) ** 0.5
    value.mul_(1 - lr * settings.weight_decay)
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    denominator = (exp_avg_sq.sqrt() / bias_correction2_sqrt).add_(settings.eps)
    step_size = lr / bias_correction1
    if isinstance(step_size, Tensor):
        value.sub_(exp_avg / denominator * step_size)
    else:
        value.addcdiv_(exp_avg, denominator, value=-step_size)


def grad_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Root of the sum of all squares.

    Args:
        tensors: At least one, on one device.

    Returns:
        0-d, at least float32.
    """
    norms = [torch.linalg.vector_norm(each, dtype=compute_dtype(each.dtype)) for each in tensors]
    widest = max((each.dtype for each in norms), key=lambda dtype: dtype.itemsize)
    return torch.linalg.vector_norm(torch.stack([each.to(widest) for each in norms]))


def scale_by_norm(tensors: Sequence[Tensor], norm: Tensor, max_norm: float) -> None:
    """Multiply tensors in place so that their norm is at most `max_norm`.

    Args:
        tensors: What to scale.
        norm: Their norm, 0-d; if it is not finite nothing is scaled.
        max_norm: The most it may be.
    """
    factor = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
    factor = torch.where(norm.isfinite(), factor, torch.ones_like(factor))
    for each in tensors:
        each.mul_(factor.to(compute_dtype(each.dtype)))
