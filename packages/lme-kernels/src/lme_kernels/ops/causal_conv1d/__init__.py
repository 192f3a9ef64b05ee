"""Depthwise causal convolution."""

from typing import Literal, overload

from torch import Tensor

from lme_kernels.op import Backend, Op
from lme_kernels.ops.causal_conv1d import reference
from lme_kernels.packing import check_cu_seqlens

CAUSAL_CONV1D = Op(
    name="causal_conv1d",
    reference=reference.causal_conv1d,
    implementations={
        Backend.TRITON: "lme_kernels.ops.causal_conv1d._triton",
        Backend.PALLAS: "lme_kernels.ops.causal_conv1d._pallas",
    },
    # Runs when named: not yet proven on a TPU.
    manual=frozenset({Backend.PALLAS}),
)


@overload
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    return_final_state: Literal[False] = False,
    cu_seqlens: Tensor | None = None,
    backend: Backend | str | None = None,
) -> Tensor: ...
@overload
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    return_final_state: Literal[True],
    cu_seqlens: Tensor | None = None,
    backend: Backend | str | None = None,
) -> tuple[Tensor, Tensor]: ...
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: Backend | str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Mix each channel with its W - 1 earlier inputs: `y_t = sum_j weight_j x_{t-W+1+j} + bias`.

    Args:
        x: Inputs, shape (B, S, C), or (T, C) with `cu_seqlens`.
        weight: Taps of each channel, the last for the token itself, shape (C, W).
        bias: Shape (C,); `None` for none.
        activation: "silu" for `y * sigmoid(y)`, or `None`.
        initial_state: Inputs before the first token of each sequence, shape (sequences, C, W - 1),
            the latest last; `None` for zeros.
        return_final_state: Whether to return the last inputs too.
        cu_seqlens: Starts of the packed sequences and T at the end, shape (sequences + 1,), int32
            or int64, on the device of `x`; sequences may be empty. `None` if not packed.
        backend: Implementation to run; `None` takes the fastest one proven for `x`'s device.

    Returns:
        Shape and dtype of `x`; and with `return_final_state` the last W - 1 inputs of each
        sequence, shape (sequences, C, W - 1), dtype of `x`, those of shorter sequences preceded by
        the initial ones. Computed in at least float32 and rounded once.

    Raises:
        ValueError: If shapes do not fit or there is no such activation.
        UnsupportedBackendError: If `backend` is named and cannot serve the call.

    Source: the short convolution of Gu and Dao 2023, section 3.4 (arXiv:2312.00752).
    """
    if x.ndim != (3 if cu_seqlens is None else 2):
        raise ValueError(
            "`x` must have shape (B, S, C), or (T, C) with `cu_seqlens`, got "
            f"{tuple(x.shape)} {'without' if cu_seqlens is None else 'with'} it"
        )
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, None)
    C = x.shape[-1]
    if weight.ndim != 2 or weight.shape[0] != C or weight.shape[1] < 1:
        raise ValueError(f"`weight` must have shape ({C}, W), got {tuple(weight.shape)}")
    W = weight.shape[1]
    if bias is not None and bias.shape != (C,):
        raise ValueError(f"`bias` must have shape ({C},), got {tuple(bias.shape)}")
    sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if initial_state is not None and initial_state.shape != (sequences, C, W - 1):
        raise ValueError(
            f"`initial_state` must have shape ({sequences}, {C}, {W - 1}), got "
            f"{tuple(initial_state.shape)}"
        )
    if activation not in (None, "silu"):
        raise ValueError(f'`activation` must be "silu" or `None`, got {activation!r}')
    function = CAUSAL_CONV1D.choose(backend, x, weight, bias, initial_state)
    y = function(x, weight, bias, initial_state, cu_seqlens, activation == "silu")
    if not return_final_state:
        return y
    return y, reference.last_inputs(x, initial_state, cu_seqlens, W)
