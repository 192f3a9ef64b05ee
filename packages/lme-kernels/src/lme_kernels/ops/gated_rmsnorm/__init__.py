"""Root mean square normalisation with a gate."""

from torch import Tensor

from lme_kernels.op import Backend, Op
from lme_kernels.ops.gated_rmsnorm import reference

GATED_RMSNORM = Op(
    name="gated_rmsnorm",
    reference=reference.gated_rmsnorm,
    implementations={Backend.TRITON: "lme_kernels.ops.gated_rmsnorm._triton"},
)


def gated_rmsnorm(
    x: Tensor,
    gate: Tensor,
    weight: Tensor | None,
    *,
    eps: float = 1e-6,
    norm_before_gate: bool = False,
    backend: Backend | str | None = None,
) -> Tensor:
    """Normalise rows that are gated by `silu(gate)`, before or after the normalisation.

    Args:
        x: Activations, shape (..., hidden).
        gate: Input of the gate, shape and dtype of `x`.
        weight: Scale of the normalisation, shape (hidden,); `None` for no scale.
        eps: Added to the mean square, in units of `x` squared.
        norm_before_gate: Whether the result is `rmsnorm(x) * silu(gate)` (gated DeltaNet) instead
            of `rmsnorm(x * silu(gate))` (Mamba 2).
        backend: Implementation to run; `None` takes the fastest one proven for `x`'s device.

    Returns:
        Shape (..., hidden), dtype of `x`; computed in at least float32 and rounded once.

    Raises:
        ValueError: If `gate` or `weight` does not fit `x`.
        UnsupportedBackendError: If `backend` is named and cannot serve the call.

    Source: Dao and Gu 2024, section 7.1 (arXiv:2405.21060); Yang et al. 2024, section 3.4
    (arXiv:2412.06464).
    """
    if gate.shape != x.shape or gate.dtype != x.dtype:
        raise ValueError(
            f"`gate` must have the shape {tuple(x.shape)} and dtype {x.dtype} of `x`, got "
            f"{tuple(gate.shape)} and {gate.dtype}"
        )
    if weight is not None and weight.shape != x.shape[-1:]:
        expected, got = tuple(x.shape[-1:]), tuple(weight.shape)
        raise ValueError(f"`weight` must have shape {expected} to match `x`, got {got}")
    function = GATED_RMSNORM.choose(backend, x, gate, weight)
    return function(x, gate, weight, eps, norm_before_gate)
