"""Linear attention with decay."""

from typing import Literal, overload

from torch import Tensor

from lme_kernels.op import Backend, Op
from lme_kernels.ops.linear_attention import reference
from lme_kernels.ops.linear_attention.arguments import (
    ChunkOptions,
    check_heads,
    check_shape,
    check_tokens,
    num_sequences,
)

LINEAR_ATTENTION = Op(
    name="linear_attention",
    reference=reference.linear_attention,
    implementations={
        Backend.TRITON: "lme_kernels.ops.linear_attention._triton",
        Backend.PALLAS: "lme_kernels.ops.linear_attention._pallas",
    },
    # Runs when named: its proofs have not run on a TPU.
    manual=frozenset({Backend.PALLAS}),
)


@overload
def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    log_decay: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    return_final_state: Literal[False] = False,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = 64,
    inclusive: bool = True,
    backend: Backend | str | None = None,
) -> Tensor: ...
@overload
def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    log_decay: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    return_final_state: Literal[True],
    cu_seqlens: Tensor | None = None,
    chunk_size: int = 64,
    inclusive: bool = True,
    backend: Backend | str | None = None,
) -> tuple[Tensor, Tensor]: ...
def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    log_decay: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = 64,
    inclusive: bool = True,
    backend: Backend | str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Run `H_t = exp(log_decay_t) H_{t-1} + k_t v_t^T` and read `y_t = scale * q_t H_t`.

    A token sees itself; with `inclusive=False` it reads the state before it, `H_{t-1}`. The number
    of heads N is the largest of the three tensors'; one with fewer serves groups of heads that
    follow each other: head n takes its head n // (N / heads).

    Args:
        query: Shape (B, S, heads, K), or (T, heads, K) with `cu_seqlens`.
        key: Shape (B, S, heads, K) or (T, heads, K), dtype of `query`.
        value: Shape (B, S, heads, V) or (T, heads, V), dtype of `query`.
        log_decay: Natural logarithm of what the state is multiplied with before each token, finite
            and at most 0, any floating-point dtype: shape (B, S, N) or (T, N), one a head, or with
            K more channels, one a row of the state; `None` for no decay.
        scale: Factor of the result; `None` for K^-0.5.
        initial_state: State before the first token of each sequence, shape (sequences, N, K, V),
            any floating-point dtype; `None` for zeros.
        return_final_state: Whether to return the last state too.
        cu_seqlens: Starts of the packed sequences and T at the end, shape (sequences + 1,), int32
            or int64, on the device of `query`; sequences may be empty. `None` if not packed.
        chunk_size: Tokens that are multiplied at once; it changes rounding, memory and time, not
            the result. Kernels may take another.
        inclusive: Whether a token sees itself.
        backend: Implementation to run; `None` takes the fastest one proven for `query`'s device.

    Returns:
        All `y_t`, shape (B, S, N, V) or (T, N, V), dtype of `query`; and with `return_final_state`
        the last state of each sequence, shape (sequences, N, K, V), dtype of `initial_state`, or of
        `query` without one: of an empty sequence the initial one. States are carried in at least
        float32.

    Raises:
        ValueError: If shapes or dtypes do not fit or an option is out of range.
        UnsupportedBackendError: If `backend` is named and cannot serve the call.

    Source: Katharopoulos et al. 2020, equations 16 to 18 (arXiv:2006.16236), without the
    normaliser; decay and chunks as in Yang et al. 2024, section 4 (arXiv:2312.06635).
    """
    check_tokens({"query": query, "key": key, "value": value}, cu_seqlens)
    tokens, K, V = query.shape[:-2], query.shape[-1], value.shape[-1]
    N = check_heads({"query": query.shape[-2], "key": key.shape[-2], "value": value.shape[-2]})
    check_shape("key", key, [(*tokens, key.shape[-2], K)])
    check_shape("log_decay", log_decay, [(*tokens, N), (*tokens, N, K)])
    check_shape("initial_state", initial_state, [(num_sequences(query, cu_seqlens), N, K, V)])
    options = ChunkOptions(K**-0.5 if scale is None else scale, chunk_size, inclusive).check()
    function = LINEAR_ATTENTION.choose(backend, query, key, value, log_decay, initial_state)
    y, state = function(query, key, value, log_decay, initial_state, cu_seqlens, options)
    return (y, state) if return_final_state else y
