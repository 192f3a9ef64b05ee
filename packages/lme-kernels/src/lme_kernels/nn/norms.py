"""Normalisations as modules."""

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from lme_kernels.op import Backend
from lme_kernels.ops.gated_rmsnorm import gated_rmsnorm
from lme_kernels.ops.layernorm import layernorm
from lme_kernels.ops.p_norm import p_norm
from lme_kernels.ops.rmsnorm import rmsnorm


class _Norm(nn.Module):
    """What norms share: a scale over the last dimension, or none."""

    weight: Parameter | None

    def __init__(
        self,
        hidden_size: int,
        eps: float,
        elementwise_affine: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        backend: Backend | str | None,
    ) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.eps = eps
        self.backend = backend
        weight = None
        if elementwise_affine:
            weight = Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        self.register_parameter("weight", weight)

    def extra_repr(self) -> str:
        return f"{self.hidden_size}, eps={self.eps}, backend={self.backend}"


class RMSNorm(_Norm):
    """`rmsnorm` with a scale that starts at one; its state is that of `torch.nn.RMSNorm`."""

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-6,
        elementwise_affine: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        backend: Backend | str | None = None,
    ) -> None:
        """Make the module.

        Args:
            hidden_size: Size of the last dimension.
            eps: Added to the mean square.
            elementwise_affine: Whether there is a scale.
            device: Where the scale is made.
            dtype: Dtype of the scale.
            backend: Implementation to run; `None` takes the fastest one proven.
        """
        super().__init__(hidden_size, eps, elementwise_affine, device, dtype, backend)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the rows of `x`, shape (..., hidden_size)."""
        return rmsnorm(x, self.weight, eps=self.eps, backend=self.backend)


class LayerNorm(_Norm):
    """`layernorm` with a scale and a shift; its state is that of `torch.nn.LayerNorm`."""

    bias: Parameter | None

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        backend: Backend | str | None = None,
    ) -> None:
        """Make the module.

        Args:
            hidden_size: Size of the last dimension.
            eps: Added to the variance.
            elementwise_affine: Whether there are a scale and a shift.
            bias: Whether there is a shift, if there is a scale.
            device: Where they are made.
            dtype: Their dtype.
            backend: Implementation to run; `None` takes the fastest one proven.
        """
        super().__init__(hidden_size, eps, elementwise_affine, device, dtype, backend)
        shift = None
        if elementwise_affine and bias:
            shift = Parameter(torch.zeros(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", shift)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the rows of `x`, shape (..., hidden_size)."""
        return layernorm(x, self.weight, self.bias, eps=self.eps, backend=self.backend)


class GatedRMSNorm(_Norm):
    """`gated_rmsnorm` with a scale that starts at one."""

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-6,
        elementwise_affine: bool = True,
        *,
        norm_before_gate: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        backend: Backend | str | None = None,
    ) -> None:
        """Make the module.

        Args:
            hidden_size: Size of the last dimension.
            eps: Added to the mean square.
            elementwise_affine: Whether there is a scale.
            norm_before_gate: Whether the gate multiplies what is normalised, not what comes in.
            device: Where the scale is made.
            dtype: Dtype of the scale.
            backend: Implementation to run; `None` takes the fastest one proven.
        """
        super().__init__(hidden_size, eps, elementwise_affine, device, dtype, backend)
        self.norm_before_gate = norm_before_gate

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        """Normalise the rows of `x`, gated by `gate`, both of shape (..., hidden_size)."""
        return gated_rmsnorm(
            x,
            gate,
            self.weight,
            eps=self.eps,
            norm_before_gate=self.norm_before_gate,
            backend=self.backend,
        )


class PNorm(_Norm):
    """`p_norm` with a scale that starts at one."""

    def __init__(
        self,
        hidden_size: int,
        p: float = 2.0,
        eps: float = 1e-6,
        elementwise_affine: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        backend: Backend | str | None = None,
    ) -> None:
        """Make the module.

        Args:
            hidden_size: Size of the last dimension.
            p: Exponent of the norm.
            eps: Least norm to divide by.
            elementwise_affine: Whether there is a scale.
            device: Where the scale is made.
            dtype: Dtype of the scale.
            backend: Implementation to run; `None` takes the fastest one proven.
        """
        super().__init__(hidden_size, eps, elementwise_affine, device, dtype, backend)
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """Divide the rows of `x`, shape (..., hidden_size), by their norm."""
        return p_norm(x, self.weight, p=self.p, eps=self.eps, backend=self.backend)
