"""Long short-term memory with matrices a head."""

from torch import Tensor

from lme_kernels.op import Backend, Op
from lme_kernels.ops.lstm import reference
from lme_kernels.ops.rnn.sequences import (
    ScanOptions,
    check_inputs,
    check_shape,
    check_state,
    common_heads,
    num_sequences,
)

LSTM = Op(
    name="lstm",
    reference=reference.lstm,
    implementations={Backend.TRITON: "lme_kernels.ops.lstm._triton"},
)


def lstm(
    x: Tensor,
    weight: Tensor,
    forget_input: Tensor,
    forget_weight: Tensor,
    input_input: Tensor,
    input_weight: Tensor,
    output_input: Tensor,
    output_weight: Tensor,
    *,
    initial_state: Tensor | None = None,
    initial_cell: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    gradient_clipping: float | None = None,
    backend: Backend | str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run a long short-term memory over each sequence, every head with its own matrices.

    With states as row vectors and `*` elementwise, for each token:

        g = tanh(h W + x)
        f = sigmoid(h W_f + x_f)
        i = sigmoid(h W_i + x_i)
        o = sigmoid(h W_o + x_o)
        c = f * c + i * g
        h = o * tanh(c)

    Gates do not see the cell c (no peepholes). The number of heads N is the largest of all tensors;
    one with fewer serves groups of heads that follow each other: head n takes its head
    n // (N / heads).

    Args:
        x: Inputs of the candidate g, shape (B, S, heads, D), or (T, heads, D) with `cu_seqlens`.
        weight: Its matrices W, shape (heads, D, D), dtype of `x`.
        forget_input: Inputs of the forget gate f, like `x`, with its own number of heads.
        forget_weight: Its matrices W_f, like `weight`.
        input_input: Inputs of the input gate i, like `x`.
        input_weight: Its matrices W_i, like `weight`.
        output_input: Inputs of the output gate o, like `x`.
        output_weight: Its matrices W_o, like `weight`.
        initial_state: h before the first token of each sequence, shape (sequences, N, D), any
            floating-point dtype; `None` for zeros.
        initial_cell: c before the first token of each sequence, in the same way.
        cu_seqlens: Starts of the packed sequences and T at the end, shape (sequences + 1,), int32
            or int64, on the device of `x`; sequences may be empty. `None` if not packed.
        max_seqlen: At least the longest length of the packed sequences, in tokens, which saves the
            reference from reading it; kernels do not need it.
        gradient_clipping: Bound on the magnitude of each element of the gradients of each h and
            each c (not of the initial ones), above 0; `None` for none.
        backend: Implementation to run; `None` takes the fastest one proven for `x`'s device.

    Returns:
        All h, shape (B, S, N, D) or (T, N, D), dtype of `x`; the last h and the last c of each
        sequence, shape (sequences, N, D), each in the dtype of the initial one, or of `x` without
        one: of an empty sequence the initial ones. Both are carried in at least float32.

    Raises:
        ValueError: If shapes or dtypes do not fit or an option is out of range.
        UnsupportedBackendError: If `backend` is named and cannot serve the call.

    Source: Hochreiter and Schmidhuber 1997 with the forget gate of Gers et al. 2000; the equations
    are those of `torch.nn.LSTM`.
    """
    inputs = {
        "x": x,
        "forget_input": forget_input,
        "input_input": input_input,
        "output_input": output_input,
    }
    matrices = {
        "weight": weight,
        "forget_weight": forget_weight,
        "input_weight": input_weight,
        "output_weight": output_weight,
    }
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
    shape = (num_sequences(x, cu_seqlens), N, D)
    check_state("initial_state", initial_state, shape)
    check_state("initial_cell", initial_cell, shape)
    options = ScanOptions(max_seqlen, gradient_clipping).check()
    pairs = zip(inputs.values(), matrices.values(), strict=True)
    tensors = (*(each for pair in pairs for each in pair), initial_state, initial_cell)
    return LSTM.choose(backend, *tensors)(*tensors, cu_seqlens, options)
