"""Losses as modules."""

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from lme_kernels.op import Backend
from lme_kernels.ops.cross_entropy import cross_entropy
from lme_kernels.ops.fused_linear_cross_entropy import fused_linear_cross_entropy


class CrossEntropyLoss(nn.Module):
    """`cross_entropy` with fixed options."""

    def __init__(
        self,
        *,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        reduction: str = "mean",
        backend: Backend | str | None = None,
    ) -> None:
        """Make the module; the options are those of `lme_kernels.functional.cross_entropy`."""
        super().__init__()
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.z_loss = z_loss
        self.softcap = softcap
        self.logit_scale = logit_scale
        self.reduction = reduction
        self.backend = backend

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Compute the loss of logits, shape (..., V), and labels, shape (...)."""
        return cross_entropy(
            logits,
            labels,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            softcap=self.softcap,
            logit_scale=self.logit_scale,
            reduction=self.reduction,
            backend=self.backend,
        )


class LinearCrossEntropyLoss(nn.Module):
    """An output layer and its loss, whose logits are never whole in memory.

    Its state is that of `torch.nn.Linear(hidden_size, vocab_size, bias=False)`.
    """

    def __init__(
        self,
        hidden_size: int,
        vocab_size: int,
        *,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        reduction: str = "mean",
        grad_accum_dtype: torch.dtype | None = torch.float32,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        backend: Backend | str | None = None,
    ) -> None:
        """Make the module; options as in `lme_kernels.functional.fused_linear_cross_entropy`.

        Args:
            hidden_size: Size of the last hidden states.
            vocab_size: Number of classes.
            ignore_index: Label of rows that do not count.
            label_smoothing: Share of the target spread over all classes.
            z_loss: Weight of the square of the normaliser's logarithm.
            softcap: Bound on logits; `None` for none.
            logit_scale: Factor of logits.
            reduction: "none", "sum" or "mean".
            grad_accum_dtype: Dtype in which the weight's gradient is summed.
            device: Where the weight is made.
            dtype: Dtype of the weight.
            backend: Implementation to run; `None` takes the fastest one proven.
        """
        super().__init__()
        self.weight = Parameter(torch.empty(vocab_size, hidden_size, device=device, dtype=dtype))
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.z_loss = z_loss
        self.softcap = softcap
        self.logit_scale = logit_scale
        self.reduction = reduction
        self.grad_accum_dtype = grad_accum_dtype
        self.backend = backend
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight: normal, of standard deviation hidden_size^-0.5."""
        nn.init.normal_(self.weight, std=self.weight.shape[1] ** -0.5)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        """Compute the loss.

        Args:
            x: Last hidden states, shape (..., hidden_size).
            labels: Classes, shape (...).

        Returns:
            A scalar, or shape (...) for the reduction "none".
        """
        loss = fused_linear_cross_entropy(
            x.flatten(0, -2),
            self.weight,
            labels.flatten(),
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            softcap=self.softcap,
            logit_scale=self.logit_scale,
            reduction=self.reduction,
            grad_accum_dtype=self.grad_accum_dtype,
            backend=self.backend,
        )
        return loss.reshape(labels.shape) if self.reduction == "none" else loss
