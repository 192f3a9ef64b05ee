"""What the Triton kernels of recurrences share.

A program walks `BLOCK_B` sequences of one head, with tiles of shape (BLOCK_D, BLOCK_B): channels
down, sequences across. So tensor cores get the weights as their first operand, which is never
padded, and the few sequences as their second. Products of a single sequence are multiplications
and sums: rows of the weights lie in neighbouring threads, a channel of the state in those that hold
its row, and inputs are loaded and added where the sums come out.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lme_kernels._triton_launch import thin_launch
from lme_kernels.device import why_not_triton

MAX_HEAD = 256
MAX_HEAD_FLOAT32 = 128


def why_not_scan(D: int, *tensors: Tensor | None) -> str | None:
    """Say why the kernels with heads of `D` channels cannot take `tensors`, inputs first."""
    reason = why_not_triton(*tensors)
    if reason is not None:
        return reason
    x = tensors[0]
    largest = MAX_HEAD_FLOAT32 if x is not None and x.dtype == torch.float32 else MAX_HEAD
    if not 1 <= D <= largest:
        return f"heads have {D} channels, and in this dtype it takes from 1 to {largest}"
    return None


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp2(x * -1.4426950408889634))


@triton.jit
def tanh(x, EXACT: tl.constexpr):
    """Hyperbolic tangent; `EXACT` to float32's relative precision near 0 too."""
    y = 1.0 - 2.0 / (1.0 + tl.exp2(x * 2.8853900817779268))
    if EXACT:
        # Fitted to (tanh(x) / x - 1) / x^2 up to 0.6: within one rounding and a quarter there.
        square = x * x
        series = 0.02080061472952366 - square * 0.005900357384234667
        series = 0.1333194226026535 + square * (-0.05378526821732521 + square * series)
        series = -0.33333298563957214 + square * series
        y = tl.where(tl.abs(x) < 0.6, x + x * (square * series), y)
    return y


@triton.jit
def bounds_of(cu_ptr, sequence, sequences, S, PACKED: tl.constexpr):
    """First token of each sequence, in 64 bits, and its length, 0 for those past the end."""
    here = sequence < sequences
    if PACKED:
        start = tl.load(cu_ptr + sequence, mask=here, other=0).to(tl.int64)
        length = tl.load(cu_ptr + sequence + 1, mask=here, other=0).to(tl.int64) - start
        length = length.to(tl.int32)
    else:
        start = sequence * S
        length = tl.where(here, S, 0)
    return start, length


@triton.jit
def load_matrix(ptr, index, D: tl.constexpr, BLOCK_D: tl.constexpr, DOT: tl.constexpr):
    """Load matrix `index` of those behind `ptr`, in float32 unless it is for tensor cores."""
    row, column = tl.arange(0, BLOCK_D)[:, None], tl.arange(0, BLOCK_D)[None, :]
    offset = index.to(tl.int64) * D * D + row * D + column
    matrix = tl.load(ptr + offset, mask=(row < D) & (column < D), other=0.0)
    if not DOT:
        matrix = matrix.to(tl.float32)
    return matrix


@triton.jit
def product(matrix, state, DOT: tl.constexpr):
    """Multiply a matrix with the columns of `state`, summed in float32."""
    if DOT:
        result = tl.dot(matrix, state.to(matrix.dtype))
    else:
        # Not `tl.trans`: the compiler would give every other product the transposed layout, whose
        # sums go across warps.
        flat = tl.sum(state, axis=1)
        result = tl.sum(matrix * flat[None, :], axis=1, keep_dims=True)
    return result


@triton.jit
def load_steps(starts, channel, mask, step, length, stride, AHEAD: tl.constexpr):
    """Load the tiles of `AHEAD` steps from `step` on, `stride` elements apart, as a tuple.

    Pointers to the tokens and the channels are added last, which keeps most of the arithmetic in
    the few numbers that there are of tokens.
    """
    tiles = ()
    for u in tl.static_range(AHEAD):
        offset = (step + u).to(tl.int64) * stride
        live = mask & (step + u < length)
        tiles = tiles + (tl.load(starts + offset + channel, mask=live, other=0.0),)  # noqa: RUF005
    return tiles


@thin_launch
@triton.jit(do_not_specialize=["S", "width"])
def _previous_kernel(
    initial_ptr,
    cu_ptr,
    previous_ptr,
    S,
    width,
    HAS_INITIAL: tl.constexpr,
    PACKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sequence = tl.program_id(0) + tl.arange(0, 1).to(tl.int64)
    start, length = bounds_of(cu_ptr, sequence, sequence + 1, S, PACKED)
    for column in range(0, width, BLOCK):
        offset = column + tl.arange(0, BLOCK)
        mask = (offset < width) & (length > 0)
        state = tl.zeros((BLOCK,), dtype=tl.float32)
        if HAS_INITIAL:
            state = tl.load(initial_ptr + sequence * width + offset, mask=mask, other=0.0)
        tl.store(previous_ptr + start * width + offset, state, mask=mask)


def states_before(y: Tensor, initial: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """Return the state before each token, shape (T, N, D), dtype of `y`.

    Args:
        y: The state after each token, shape (B, S, N, D), or (T, N, D) if packed.
        initial: The state before each sequence, shape (sequences, N, D), contiguous; `None` for
            zeros.
        cu_seqlens: Starts of packed sequences.
    """
    tokens = y.reshape(-1, *y.shape[-2:])
    previous = torch.empty_like(tokens)
    if tokens.numel() == 0:
        return previous
    previous[1:].copy_(tokens[:-1])
    sequences = y.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    _previous_kernel[(sequences,)](
        initial,
        cu_seqlens,
        previous,
        y.shape[-3],
        tokens.shape[1] * tokens.shape[2],
        HAS_INITIAL=initial is not None,
        PACKED=cu_seqlens is not None,
        BLOCK=1024,
        num_warps=4,
    )
    return previous


def as_tokens(x: Tensor) -> tuple[Tensor, int, int]:
    """Return `x`, or a copy if need be, and its strides between tokens and between heads.

    Args:
        x: Shape (B, S, heads, D), or (T, heads, D) if packed.
    """
    apart = x.ndim == 4 and x.shape[0] > 1 and x.stride(0) != x.shape[1] * x.stride(1)
    if x.stride(-1) != 1 or apart:
        x = x.contiguous()
    return x, x.stride(-3), x.stride(-2)


def transposed(weight: Tensor) -> Tensor:
    """Return the matrices transposed, in memory too."""
    return weight.transpose(-1, -2).contiguous()


def sum_heads(grad: Tensor, like: Tensor) -> Tensor:
    """Sum the gradients of the heads that shared one of `like`, in float32.

    Args:
        grad: Shape (..., N, D).
        like: Shape (..., heads, D).
    """
    if grad.shape[-2] == like.shape[-2]:
        return grad.reshape(like.shape)
    size = grad.shape[-2] // like.shape[-2]
    groups = grad.reshape(*like.shape[:-1], size, like.shape[-1])
    return groups.sum(-2, dtype=torch.float32).to(like.dtype)


def weight_gradient(before: Tensor, delta: Tensor, weight: Tensor) -> Tensor:
    """Sum `before^T delta` over tokens for each matrix, in float32.

    Args:
        before: What the matrix was multiplied with, shape (T, N, D).
        delta: Gradient of the product, shape (T, N, D).
        weight: Shape (heads, D, D).
    """
    if before.is_cuda and before.dtype != torch.float32:
        rows, columns = before.permute(1, 2, 0), delta.transpose(0, 1)
        full = torch.bmm(rows, columns, out_dtype=torch.float32)
    else:
        full = _sum_products(before.float(), delta.float())
    if full.shape[0] != weight.shape[0]:
        full = full.reshape(
            weight.shape[0], full.shape[0] // weight.shape[0], *weight.shape[1:]
        ).sum(1)
    return full.to(weight.dtype)


def _sum_products(before: Tensor, delta: Tensor, piece: int = 256) -> Tensor:
    """Sum `before^T delta` over tokens in pieces: one sum over all would round once a token."""
    T, N, D = before.shape
    whole = T // piece * piece
    full = torch.bmm(before[whole:].permute(1, 2, 0), delta[whole:].transpose(0, 1))
    if whole == 0:
        return full
    rows = before[:whole].reshape(-1, piece, N, D).permute(0, 2, 3, 1)
    columns = delta[:whole].reshape(-1, piece, N, D).transpose(1, 2)
    return full + torch.matmul(rows, columns).sum(0)
