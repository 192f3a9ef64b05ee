"""Activations as modules; they have no parameters."""

from typing import Literal

from torch import Tensor, nn

from lme_kernels.op import Backend
from lme_kernels.ops.geglu import geglu
from lme_kernels.ops.relu_squared import relu_squared
from lme_kernels.ops.swiglu import swiglu
from lme_kernels.ops.swiglu_packed import swiglu_packed


class _Activation(nn.Module):
    def __init__(self, *, backend: Backend | str | None = None) -> None:
        """Make the module.

        Args:
            backend: Implementation to run; `None` takes the fastest one proven.
        """
        super().__init__()
        self.backend = backend

    def extra_repr(self) -> str:
        return f"backend={self.backend}"


class SwiGLU(_Activation):
    """`swiglu`: SiLU of a gate, times another input."""

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        """Multiply `up` by SiLU of `gate`, of one shape."""
        return swiglu(gate, up, backend=self.backend)


class GEGLU(_Activation):
    """`geglu`: GELU of a gate, times another input."""

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        """Multiply `up` by GELU of `gate`, of one shape."""
        return geglu(gate, up, backend=self.backend)


class ReLUSquared(_Activation):
    """`relu_squared`: the square of the positive part."""

    def forward(self, x: Tensor) -> Tensor:
        """Square the positive part of `x`, any shape."""
        return relu_squared(x, backend=self.backend)


class PackedSwiGLU(_Activation):
    """`swiglu_packed`: gates and factors in one tensor."""

    def __init__(
        self,
        layout: Literal["interleaved", "concatenated"] = "interleaved",
        *,
        backend: Backend | str | None = None,
    ) -> None:
        """Make the module.

        Args:
            layout: Which channels are gates: "interleaved" the even ones, "concatenated" the
                first half.
            backend: Implementation to run; `None` takes the fastest one proven.
        """
        super().__init__(backend=backend)
        self.layout: Literal["interleaved", "concatenated"] = layout

    def forward(self, x: Tensor) -> Tensor:
        """Map `x` of shape (..., 2 * size) to (..., size)."""
        return swiglu_packed(x, layout=self.layout, backend=self.backend)
