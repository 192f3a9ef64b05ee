"""The state space model of Mamba 2."""

from typing import Literal, overload

from torch import Tensor

from lme_kernels.op import Backend, Op
from lme_kernels.ops.linear_attention.arguments import (
    ChunkOptions,
    check_heads,
    check_shape,
    check_tokens,
    num_sequences,
)
from lme_kernels.ops.mamba2_ssm import reference

MAMBA2_SSM = Op(
    name="mamba2_ssm",
    reference=reference.mamba2_ssm,
    implementations={Backend.TRITON: "lme_kernels.ops.mamba2_ssm._triton"},
)


@overload
def mamba2_ssm(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_final_state: Literal[False] = False,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = 64,
    backend: Backend | str | None = None,
) -> Tensor: ...
@overload
def mamba2_ssm(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_final_state: Literal[True],
    cu_seqlens: Tensor | None = None,
    chunk_size: int = 64,
    backend: Backend | str | None = None,
) -> tuple[Tensor, Tensor]: ...
def mamba2_ssm(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = 64,
    backend: Backend | str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Run `H_t = exp(dt_t A) H_{t-1} + dt_t x_t B_t^T` and read `y_t = H_t C_t + D x_t`.

    Head j takes group j // (N / G) of `B` and `C`.

    Args:
        x: Inputs, shape (batch, S, N, P), or (T, N, P) with `cu_seqlens`.
        dt: Steps after the softplus, at least 0, shape (batch, S, N) or (T, N), any floating-point
            dtype.
        A: Rate of each head, negative, shape (N,), any floating-point dtype.
        B: What writes to the state, shape (batch, S, G, n) or (T, G, n), dtype of `x`.
        C: What reads the state, shape of `B`, dtype of `x`.
        D: Factor of the input that is added, shape (N,), any floating-point dtype; `None` for none.
        initial_state: State before the first token of each sequence, shape (sequences, N, P, n),
            any floating-point dtype; `None` for zeros.
        return_final_state: Whether to return the last state too.
        cu_seqlens: Starts of the packed sequences and T at the end, shape (sequences + 1,), int32
            or int64, on the device of `x`; sequences may be empty. `None` if not packed.
        chunk_size: Tokens that are multiplied at once; it changes rounding, memory and time, not
            the result. Kernels may take another.
        backend: Implementation to run; `None` takes the fastest one proven for `x`'s device.

    Returns:
        All `y_t`, shape and dtype of `x`; and with `return_final_state` the last state of each
        sequence, shape (sequences, N, P, n), dtype of `initial_state`, or of `x` without one: of an
        empty sequence the initial one. States are carried in at least float32.

    Raises:
        ValueError: If shapes or dtypes do not fit or an option is out of range.
        UnsupportedBackendError: If `backend` is named and cannot serve the call.

    Source: Dao and Gu 2024, section 6 (arXiv:2405.21060).
    """
    check_tokens({"x": x, "B": B, "C": C}, cu_seqlens)
    tokens, N, P, n = x.shape[:-2], x.shape[-2], x.shape[-1], B.shape[-1]
    if check_heads({"x": N, "B": B.shape[-2], "C": C.shape[-2]}) != N:
        raise ValueError(f"`B` and `C` must have at most the {N} heads of `x`, got {B.shape[-2]}")
    check_shape("C", C, [tuple(B.shape)])
    check_shape("dt", dt, [(*tokens, N)])
    check_shape("A", A, [(N,)])
    check_shape("D", D, [(N,)])
    check_shape("initial_state", initial_state, [(num_sequences(x, cu_seqlens), N, P, n)])
    options = ChunkOptions(1.0, chunk_size).check()
    tensors = (x, dt, A, B, C, D, initial_state)
    y, state = MAMBA2_SSM.choose(backend, *tensors)(*tensors, cu_seqlens, options)
    return (y, state) if return_final_state else y
