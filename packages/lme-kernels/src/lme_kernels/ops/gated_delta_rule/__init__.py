"""The gated delta rule."""

from typing import Literal, overload

from torch import Tensor

from lme_kernels.op import Backend, Op
from lme_kernels.ops.gated_delta_rule import reference
from lme_kernels.ops.linear_attention.arguments import (
    ChunkOptions,
    check_heads,
    check_shape,
    check_tokens,
    num_sequences,
)

GATED_DELTA_RULE = Op(
    name="gated_delta_rule",
    reference=reference.gated_delta_rule,
    implementations={Backend.TRITON: "lme_kernels.ops.gated_delta_rule._triton"},
)


@overload
def gated_delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    l2_normalize: bool = True,
    initial_state: Tensor | None = None,
    return_final_state: Literal[False] = False,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = 64,
    backend: Backend | str | None = None,
) -> Tensor: ...
@overload
def gated_delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    l2_normalize: bool = True,
    initial_state: Tensor | None = None,
    return_final_state: Literal[True],
    cu_seqlens: Tensor | None = None,
    chunk_size: int = 64,
    backend: Backend | str | None = None,
) -> tuple[Tensor, Tensor]: ...
def gated_delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    l2_normalize: bool = True,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = 64,
    backend: Backend | str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Correct a decaying memory towards each token and read `y_t = scale * q_t H_t`.

    `H_t = exp(log_decay_t) (I - beta_t k_t k_t^T) H_{t-1} + beta_t k_t v_t^T`. The number of heads
    N is that of `log_decay`; a tensor with fewer serves groups of heads that follow each other:
    head n takes its head n // (N / heads).

    Args:
        query: Shape (B, S, heads, K), or (T, heads, K) with `cu_seqlens`.
        key: Shape (B, S, heads, K) or (T, heads, K), dtype of `query`.
        value: Shape (B, S, heads, V) or (T, heads, V), dtype of `query`.
        log_decay: Natural logarithm of what the state is multiplied with before each token, finite
            and at most 0, shape (B, S, N) or (T, N), any floating-point dtype.
        beta: Strength of a token's writing, from 0 to 2, shape of `log_decay`, any floating-point
            dtype.
        scale: Factor of the result; `None` for K^-0.5.
        l2_normalize: Whether queries and keys are divided by their norm, the square root of the sum
            of their squares and 1e-6.
        initial_state: State before the first token of each sequence, shape (sequences, N, K, V),
            any floating-point dtype; `None` for zeros.
        return_final_state: Whether to return the last state too.
        cu_seqlens: Starts of the packed sequences and T at the end, shape (sequences + 1,), int32
            or int64, on the device of `query`; sequences may be empty. `None` if not packed.
        chunk_size: Tokens that are multiplied at once; it changes rounding, memory and time, not
            the result. Kernels may take another.
        backend: Implementation to run; `None` takes the fastest one proven for `query`'s device.

    Returns:
        All `y_t`, shape (B, S, N, V) or (T, N, V), dtype of `query`; and with `return_final_state`
        the last state of each sequence, shape (sequences, N, K, V), dtype of `initial_state`, or of
        `query` without one: of an empty sequence the initial one. States are carried in at least
        float32.

    Raises:
        ValueError: If shapes or dtypes do not fit or an option is out of range.
        UnsupportedBackendError: If `backend` is named and cannot serve the call.

    Source: Yang et al. 2024, equation 10 and section 3.3 (arXiv:2412.06464).
    """
    check_tokens({"query": query, "key": key, "value": value}, cu_seqlens)
    tokens, K, V = query.shape[:-2], query.shape[-1], value.shape[-1]
    heads = {"query": query.shape[-2], "key": key.shape[-2], "value": value.shape[-2]}
    N = check_heads({**heads, "log_decay": log_decay.shape[-1]})
    check_shape("key", key, [(*tokens, key.shape[-2], K)])
    check_shape("log_decay", log_decay, [(*tokens, N)])
    check_shape("beta", beta, [(*tokens, N)])
    check_shape("initial_state", initial_state, [(num_sequences(query, cu_seqlens), N, K, V)])
    options = ChunkOptions(K**-0.5 if scale is None else scale, chunk_size).check()
    tensors = (query, key, value, log_decay, beta, initial_state)
    y, state = GATED_DELTA_RULE.choose(backend, *tensors)(
        *tensors, cu_seqlens, l2_normalize, options
    )
    return (y, state) if return_final_state else y
