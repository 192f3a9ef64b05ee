"""Recurrence of Elman with a matrix a head."""

from torch import Tensor

from lme_kernels.op import Backend, Op
from lme_kernels.ops.rnn import reference
from lme_kernels.ops.rnn.sequences import (
    ScanOptions,
    check_inputs,
    check_shape,
    check_state,
    common_heads,
    num_sequences,
)

RNN = Op(
    name="rnn",
    reference=reference.rnn,
    implementations={Backend.TRITON: "lme_kernels.ops.rnn._triton"},
)


def rnn(
    x: Tensor,
    weight: Tensor,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    nonlinearity: str = "tanh",
    gradient_clipping: float | None = None,
    backend: Backend | str | None = None,
) -> tuple[Tensor, Tensor]:
    """Run `h_t = tanh(h_{t-1} W + x_t)` over each sequence, every head with its own `W`.

    The number of heads N is the larger of those of `x` and `weight`; a tensor with fewer serves
    groups of heads that follow each other: head n takes its head n // (N / heads).

    Args:
        x: Inputs, shape (B, S, heads, D), or (T, heads, D) with `cu_seqlens`.
        weight: Matrices that a state, a row vector, is multiplied with, shape (heads, D, D), dtype
            of `x`.
        initial_state: State before the first token of each sequence, shape (sequences, N, D), any
            floating-point dtype; `None` for zeros.
        cu_seqlens: Starts of the packed sequences and T at the end, shape (sequences + 1,), int32
            or int64, on the device of `x`; sequences may be empty. `None` if not packed.
        max_seqlen: At least the longest length of the packed sequences, in tokens, which saves the
            reference from reading it; kernels do not need it.
        nonlinearity: "tanh", or "relu" instead of it.
        gradient_clipping: Bound on the magnitude of each element of the gradient of each `h_t`
            (not of the initial state), above 0; `None` for none.
        backend: Implementation to run; `None` takes the fastest one proven for `x`'s device.

    Returns:
        All `h_t`, shape (B, S, N, D) or (T, N, D), dtype of `x`; and the last of each sequence,
        shape (sequences, N, D), dtype of `initial_state`, or of `x` without one: of an empty
        sequence the initial one. The state is carried in at least float32.

    Raises:
        ValueError: If shapes or dtypes do not fit or an option is out of range.
        UnsupportedBackendError: If `backend` is named and cannot serve the call.

    Source: Elman 1990, figure 2; heads as in Pöppel et al. 2024 (arXiv:2412.07752).
    """
    check_inputs({"x": x}, cu_seqlens)
    check_shape("weight", weight, ("heads", x.shape[-1], x.shape[-1]), x.dtype)
    N = common_heads({"x": x.shape[-2], "weight": weight.shape[0]})
    check_state("initial_state", initial_state, (num_sequences(x, cu_seqlens), N, x.shape[-1]))
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(f'`nonlinearity` must be "tanh" or "relu", got {nonlinearity!r}')
    options = ScanOptions(max_seqlen, gradient_clipping).check()
    function = RNN.choose(backend, x, weight, initial_state)
    return function(x, weight, initial_state, cu_seqlens, nonlinearity, options)
