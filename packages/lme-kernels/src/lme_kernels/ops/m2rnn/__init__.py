"""Recurrence whose state is a matrix a head."""

from torch import Tensor

from lme_kernels.op import Backend, Op
from lme_kernels.ops.m2rnn import reference
from lme_kernels.ops.rnn.sequences import (
    ScanOptions,
    check_inputs,
    check_shape,
    check_state,
    common_heads,
    num_sequences,
)

M2RNN = Op(
    name="m2rnn",
    reference=reference.m2rnn,
    implementations={Backend.TRITON: "lme_kernels.ops.m2rnn._triton"},
)


def m2rnn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    forget: Tensor,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    gradient_clipping: float | None = None,
    backend: Backend | str | None = None,
) -> tuple[Tensor, Tensor]:
    """Run a recurrence of matrices over each sequence, every head with its own.

    With row vectors q and k of K channels and v of V, and H of shape (K, V), for each token:

        U = tanh(H W + k^T v)
        H = f H + (1 - f) U
        y = q H

    The number of heads N is the largest of all tensors; one with fewer serves groups of heads that
    follow each other: head n takes its head n // (N / heads).

    Args:
        query: Vectors q, shape (B, S, heads, K), or (T, heads, K) with `cu_seqlens`.
        key: Vectors k, like `query`, with its own number of heads.
        value: Vectors v, shape (B, S, heads, V), or (T, heads, V).
        weight: Matrices W, shape (heads, V, V), dtype of `query`.
        forget: Factors f, shape (B, S, heads), or (T, heads), meant to be from 0 to 1.
        initial_state: H before the first token of each sequence, shape (sequences, N, K, V), any
            floating-point dtype; `None` for zeros.
        cu_seqlens: Starts of the packed sequences and T at the end, shape (sequences + 1,), int32
            or int64, on the device of `query`; sequences may be empty. `None` if not packed.
        max_seqlen: At least the longest length of the packed sequences, in tokens, which saves the
            reference from reading it; kernels do not need it.
        gradient_clipping: Bound on the magnitude of each element of the gradient of each H (not of
            the initial one), above 0; `None` for none.
        backend: Implementation to run; `None` takes the fastest one proven for `query`'s device.

    Returns:
        All y, shape (B, S, N, V) or (T, N, V), dtype of `query`; and the last H of each sequence,
        shape (sequences, N, K, V), dtype of `initial_state`, or of `query` without one: of an empty
        sequence the initial one. The state is carried in at least float32.

    Raises:
        ValueError: If shapes or dtypes do not fit or an option is out of range.
        UnsupportedBackendError: If `backend` is named and cannot serve the call.

    Source: the mixer of this name in lm-engine, whose values it must agree with.
    """
    heads = {"query": query, "key": key, "value": value}
    check_inputs({**heads, "forget": forget}, cu_seqlens)
    tokens, K, V = query.shape[:-2], key.shape[-1], value.shape[-1]
    check_shape("key", key, (*tokens, "heads", query.shape[-1]), query.dtype)
    check_shape("value", value, (*tokens, "heads", V), query.dtype)
    check_shape("forget", forget, (*tokens, "heads"), query.dtype)
    check_shape("weight", weight, ("heads", V, V), query.dtype)
    counts = {name: each.shape[-2] for name, each in heads.items()}
    N = common_heads({**counts, "forget": forget.shape[-1], "weight": weight.shape[0]})
    check_state("initial_state", initial_state, (num_sequences(query, cu_seqlens), N, K, V))
    options = ScanOptions(max_seqlen, gradient_clipping).check()
    tensors = (query, key, value, weight, forget, initial_state)
    return M2RNN.choose(backend, *tensors)(*tensors, cu_seqlens, options)
