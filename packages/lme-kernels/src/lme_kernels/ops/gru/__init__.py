"""Gated recurrent unit with matrices a head."""

from torch import Tensor

from lme_kernels.op import Backend, Op
from lme_kernels.ops.gru import reference
from lme_kernels.ops.rnn.sequences import (
    ScanOptions,
    check_inputs,
    check_shape,
    check_state,
    common_heads,
    num_sequences,
)

GRU = Op(
    name="gru",
    reference=reference.gru,
    implementations={Backend.TRITON: "lme_kernels.ops.gru._triton"},
)


def gru(
    x: Tensor,
    weight: Tensor,
    forget_input: Tensor,
    forget_weight: Tensor,
    reset_input: Tensor,
    reset_weight: Tensor,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    gradient_clipping: float | None = None,
    backend: Backend | str | None = None,
) -> tuple[Tensor, Tensor]:
    """Run a gated recurrent unit over each sequence, every head with its own matrices.

    With states as row vectors and `*` elementwise, for each token:

        f = sigmoid(h W_f + x_f)
        r = sigmoid(h W_r + x_r)
        z = tanh((r * h) W + x)
        h = f * h + (1 - f) * z

    The number of heads N is the largest of all tensors; one with fewer serves groups of heads that
    follow each other: head n takes its head n // (N / heads).

    Args:
        x: Inputs of the candidate z, shape (B, S, heads, D), or (T, heads, D) with `cu_seqlens`.
        weight: Its matrices W, shape (heads, D, D), dtype of `x`.
        forget_input: Inputs of the gate f, like `x`, with its own number of heads.
        forget_weight: Its matrices W_f, like `weight`.
        reset_input: Inputs of the gate r, like `x`.
        reset_weight: Its matrices W_r, like `weight`.
        initial_state: State before the first token of each sequence, shape (sequences, N, D), any
            floating-point dtype; `None` for zeros.
        cu_seqlens: Starts of the packed sequences and T at the end, shape (sequences + 1,), int32
            or int64, on the device of `x`; sequences may be empty. `None` if not packed.
        max_seqlen: At least the longest length of the packed sequences, in tokens, which saves the
            reference from reading it; kernels do not need it.
        gradient_clipping: Bound on the magnitude of each element of the gradient of each h (not of
            the initial state), above 0; `None` for none.
        backend: Implementation to run; `None` takes the fastest one proven for `x`'s device.

    Returns:
        All h, shape (B, S, N, D) or (T, N, D), dtype of `x`; and the last of each sequence, shape
        (sequences, N, D), dtype of `initial_state`, or of `x` without one: of an empty sequence the
        initial one. The state is carried in at least float32.

    Raises:
        ValueError: If shapes or dtypes do not fit or an option is out of range.
        UnsupportedBackendError: If `backend` is named and cannot serve the call.

    Source: Cho et al. 2014, equations 5 to 8 (arXiv:1406.1078), where f is called z.
    """
    inputs = {"x": x, "forget_input": forget_input, "reset_input": reset_input}
    matrices = {"weight": weight, "forget_weight": forget_weight, "reset_weight": reset_weight}
    check_inputs(inputs, cu_seqlens)
    D = x.shape[-1]
    for name, each in inputs.items():
        check_shape(name, each, (*x.shape[:-2], "heads", D), x.dtype)
    for name, each in matrices.items():
        check_shape(name, each, ("heads", D, D), x.dtype)
    N = common_heads(
        {name: each.shape[-2] for name, each in inputs.items()}
        | {name: each.shape[0] for name, each in matrices.items()}
    )
    check_state("initial_state", initial_state, (num_sequences(x, cu_seqlens), N, D))
    options = ScanOptions(max_seqlen, gradient_clipping).check()
    tensors = (x, weight, forget_input, forget_weight, reset_input, reset_weight, initial_state)
    return GRU.choose(backend, *tensors)(*tensors, cu_seqlens, options)
