"""Optimizers and gradient norms over many tensors at once, without waiting for the device."""

from lme_kernels.optim.adamw import AdamW
from lme_kernels.optim.gradients import clip_grad_norm_, grad_norm

__all__ = ["AdamW", "clip_grad_norm_", "grad_norm"]
