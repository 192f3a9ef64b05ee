"""Depthwise causal convolution in Pallas."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, Ref
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lme_kernels.pallas.blocks import LANES, block_of, compute_dtype, resolve_interpret, sublanes
from lme_kernels.pallas.packing import check_cu_seqlens, sequence_ids

# Tokens and channels of a block; up to eight arrays of it are on chip twice.
BLOCK_TOKENS = 256
BLOCK_CHANNELS = 256


def causal_conv1d(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    *,
    activation: str | None = None,
    initial_state: Array | None = None,
    return_final_state: bool = False,
    cu_seqlens: Array | None = None,
    interpret: bool | None = None,
) -> Array | tuple[Array, Array]:
    """Mix each channel with its W - 1 earlier inputs: `y_t = sum_j weight_j x_{t-W+1+j} + bias`.

    Args:
        x: Inputs, shape (B, S, C), or (T, C) with `cu_seqlens`.
        weight: Taps of each channel, the last for the token itself, shape (C, W).
        bias: Shape (C,); `None` for none.
        activation: "silu" for `y * sigmoid(y)`, or `None`.
        initial_state: Inputs before the first token of each sequence, shape (sequences, C, W - 1),
            the latest last; `None` for zeros.
        return_final_state: Whether to return the last inputs too.
        cu_seqlens: Starts of the packed sequences and T at the end, shape (sequences + 1,), an
            integer dtype; sequences may be empty. `None` if not packed.
        interpret: Whether to run the kernel as plain jax operations; `None` does so unless a TPU is
            there.

    Returns:
        Shape and dtype of `x`; and with `return_final_state` the last W - 1 inputs of each
        sequence, shape (sequences, C, W - 1), dtype of `x`, those of shorter sequences preceded by
        the initial ones. Computed in at least float32 and rounded once.

    Raises:
        ValueError: If shapes do not fit or there is no such activation.

    Source: the short convolution of Gu and Dao 2023, section 3.4 (arXiv:2312.00752).
    """
    sequences = _check(x, weight, bias, activation, initial_state, cu_seqlens)
    C, W = weight.shape
    silu, interpret = activation == "silu", resolve_interpret(interpret)
    if initial_state is None:
        initial_state = jnp.zeros((sequences, C, W - 1), x.dtype)
    before = initial_state.swapaxes(1, 2)
    taps = weight.T
    offset = jnp.zeros((1, C), compute_dtype(x.dtype)) if bias is None else bias.reshape(1, C)
    if cu_seqlens is None:
        y = _convolve(x, before, taps, offset, silu, interpret) if x.size else x
        final = jnp.concatenate((before.astype(x.dtype), x), 1)[:, x.shape[1] :]
    else:
        # One sequence in which each document follows its own W - 1 inputs from before: no token
        # then sees another document.
        document = sequence_ids(cu_seqlens, x.shape[0])
        place = jnp.arange(x.shape[0]) + (document + 1) * (W - 1)
        starts = cu_seqlens[:-1] + jnp.arange(sequences) * (W - 1)
        earlier = (starts[:, None] + jnp.arange(W - 1)).reshape(-1)
        wide = jnp.promote_types(x.dtype, before.dtype)
        spread = jnp.zeros((x.shape[0] + sequences * (W - 1), C), wide)
        spread = spread.at[earlier].set(before.reshape(-1, C).astype(wide), unique_indices=True)
        spread = spread.at[place].set(x.astype(wide), unique_indices=True, mode="drop")
        y = x
        if x.size:
            zeros = jnp.zeros((1, W - 1, C), wide)
            y = _convolve(spread[None], zeros, taps, offset, silu, interpret)[0, place]
            y = y.astype(x.dtype)
        last = starts[:, None] + jnp.diff(cu_seqlens)[:, None] + jnp.arange(W - 1)
        final = spread[last.reshape(-1)].reshape(before.shape).astype(x.dtype)
    return (y, final.swapaxes(1, 2)) if return_final_state else y


def _check(
    x: Array,
    weight: Array,
    bias: Array | None,
    activation: str | None,
    initial_state: Array | None,
    cu_seqlens: Array | None,
) -> int:
    """Check shapes and options; return the number of sequences."""
    if x.ndim != (3 if cu_seqlens is None else 2):
        raise ValueError(
            "`x` must have shape (B, S, C), or (T, C) with `cu_seqlens`, got "
            f"{x.shape} {'without' if cu_seqlens is None else 'with'} it"
        )
    C = x.shape[-1]
    if weight.ndim != 2 or weight.shape[0] != C or weight.shape[1] < 1:
        raise ValueError(f"`weight` must have shape ({C}, W), got {weight.shape}")
    if bias is not None and bias.shape != (C,):
        raise ValueError(f"`bias` must have shape ({C},), got {bias.shape}")
    sequences = x.shape[0] if cu_seqlens is None else check_cu_seqlens(cu_seqlens)
    shape = (sequences, C, weight.shape[1] - 1)
    if initial_state is not None and initial_state.shape != shape:
        raise ValueError(f"`initial_state` must have shape {shape}, got {initial_state.shape}")
    if activation not in (None, "silu"):
        raise ValueError(f'`activation` must be "silu" or `None`, got {activation!r}')
    return sequences


def _convolve_primal(
    x: Array, before: Array, taps: Array, bias: Array, silu: bool, interpret: bool
) -> Array:
    """Convolve (B, S, C) after (B, W - 1, C) with taps (W, C) and bias (1, C)."""
    cut = _Cut(x, taps)
    return pl.pallas_call(
        partial(_forward_kernel, silu=silu),
        grid=cut.grid,
        in_specs=[cut.tokens, cut.edge, cut.of_channel(taps), cut.of_channel(bias)],
        out_specs=cut.tokens,
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        scratch_shapes=[cut.extended(1)],
        interpret=interpret,
    )(x, cut.edges_before(x, before), taps, bias)


def _convolve_forward(
    x: Array, before: Array, taps: Array, bias: Array, silu: bool, interpret: bool
) -> tuple[Array, tuple[Array, Array, Array, Array]]:
    return _convolve_primal(x, before, taps, bias, silu, interpret), (x, before, taps, bias)


def _convolve_backward(
    silu: bool, interpret: bool, saved: tuple[Array, Array, Array, Array], grad_y: Array
) -> tuple[Array, Array, Array, Array]:
    x, before, taps, bias = saved
    cut = _Cut(x, taps)
    compute = compute_dtype(x.dtype)
    grad_x, grad_taps, grad_bias = pl.pallas_call(
        partial(_backward_kernel, silu=silu, num_tokens=x.shape[1]),
        grid=cut.grid,
        in_specs=[
            *(cut.tokens, cut.edge, cut.edge),
            *(cut.tokens, cut.edge),
            *(cut.of_channel(taps), cut.of_channel(bias)),
        ],
        out_specs=[cut.tokens, cut.of_channel(taps), cut.of_channel(bias)],
        out_shape=[
            jax.ShapeDtypeStruct(x.shape, x.dtype),
            jax.ShapeDtypeStruct(taps.shape, compute),
            jax.ShapeDtypeStruct(bias.shape, compute),
        ],
        scratch_shapes=[cut.extended(2), cut.extended(1)],
        interpret=interpret,
    )(
        *(x, cut.edges_before(x, before), cut.edges_after(x)),
        *(grad_y, cut.edges_after(grad_y)),
        *(taps, bias),
    )
    # The first W - 1 outputs alone depend on what came before: few enough for plain jax.
    first = slice(0, before.shape[1])
    _, pull = jax.vjp(lambda each: _plain(x[:, first], each, taps, bias, silu), before)
    (grad_before,) = pull(grad_y[:, first])
    return grad_x, grad_before, grad_taps.astype(taps.dtype), grad_bias.astype(bias.dtype)


_convolve = jax.custom_vjp(_convolve_primal, nondiff_argnums=(4, 5))
_convolve.defvjp(_convolve_forward, _convolve_backward)


def _plain(x: Array, before: Array, taps: Array, bias: Array, silu: bool) -> Array:
    compute = compute_dtype(x.dtype)
    extended = jnp.concatenate((before, x), 1).astype(compute)
    shifted = (extended[:, j : j + x.shape[1]] for j in range(taps.shape[0]))
    y = sum(
        (tap * each for tap, each in zip(taps.astype(compute), shifted, strict=True)),
        start=bias.astype(compute),
    )
    return (jax.nn.silu(y) if silu else y).astype(x.dtype)


class _Cut:
    """Blocks of tokens and channels, and copies of the few tokens at the edges of each."""

    def __init__(self, x: Array, taps: Array) -> None:
        B, S, C = x.shape
        self._compute = compute_dtype(x.dtype)
        # Tokens at an edge: those that W - 1 others see, up to whole registers.
        self._margin = -(-max(taps.shape[0] - 1, 1) // 8) * 8
        most = max(BLOCK_TOKENS, self._margin + sublanes(x.dtype))
        self._size = block_of(S, most, sublanes(x.dtype))
        self._channels = block_of(C, BLOCK_CHANNELS, LANES)
        self._count = pl.cdiv(S, self._size)
        # Blocks of channels outermost: the gradients of the taps are summed over all others.
        self.grid = (pl.cdiv(C, self._channels), B, self._count)
        self.tokens = pl.BlockSpec((1, self._size, self._channels), lambda c, b, s: (b, s, c))
        self.edge = pl.BlockSpec((1, 1, self._margin, self._channels), lambda c, b, s: (b, s, 0, c))

    def of_channel(self, x: Array) -> pl.BlockSpec:
        """Block of an array with the channels last and few rows."""
        return pl.BlockSpec((x.shape[0], self._channels), lambda c, b, s: (0, c))

    def extended(self, edges: int) -> pl.MemoryRef:
        """Space for a block's tokens and those at one or both edges."""
        return pltpu.VMEM((self._size + edges * self._margin, self._channels), self._compute)

    def edges_before(self, x: Array, before: Array) -> Array:
        """Copy the tokens before each block: (B, blocks, margin, C), zeros before `before`."""
        first = jnp.pad(before, ((0, 0), (self._margin - before.shape[1], 0), (0, 0)))
        first = first[:, None].astype(self._compute)
        if self._count == 1:
            return first
        inner = x[:, : (self._count - 1) * self._size]
        inner = inner.reshape(x.shape[0], self._count - 1, self._size, x.shape[2])
        edges = inner[:, :, self._size - self._margin :].astype(self._compute)
        return jnp.concatenate((first, edges), 1)

    def edges_after(self, x: Array) -> Array:
        """Copy the tokens after each block: (B, blocks, margin, C), zeros past the last token."""
        B, S, C = x.shape
        last = jnp.zeros((B, 1, self._margin, C), self._compute)
        if self._count == 1:
            return last
        rest = x[:, self._size :]
        rest = jnp.pad(rest, ((0, 0), (0, self._count * self._size - S), (0, 0)))
        rest = rest.reshape(B, self._count - 1, self._size, C)[:, :, : self._margin]
        return jnp.concatenate((rest.astype(self._compute), last), 1)


def _silu_slope(y: Array) -> Array:
    sigmoid = jax.nn.sigmoid(y)
    return sigmoid * (1.0 + y * (1.0 - sigmoid))


def _forward_kernel(
    x_ref: Ref,
    before_ref: Ref,
    taps_ref: Ref,
    bias_ref: Ref,
    y_ref: Ref,
    all_ref: Ref,
    *,
    silu: bool,
) -> None:
    compute, margin, size = all_ref.dtype, before_ref.shape[2], x_ref.shape[1]
    W = taps_ref.shape[0]
    all_ref[:margin] = before_ref[0, 0].astype(compute)
    all_ref[margin:] = x_ref[0].astype(compute)
    taps = taps_ref[...].astype(compute)
    y = bias_ref[...].astype(compute)
    for j in range(W):
        y = y + taps[j : j + 1] * all_ref[pl.ds(margin - (W - 1) + j, size)]
    y_ref[0] = (jax.nn.silu(y) if silu else y).astype(y_ref.dtype)


def _backward_kernel(
    x_ref: Ref,
    before_ref: Ref,
    after_ref: Ref,
    grad_y_ref: Ref,
    grad_after_ref: Ref,
    taps_ref: Ref,
    bias_ref: Ref,
    grad_x_ref: Ref,
    grad_taps_ref: Ref,
    grad_bias_ref: Ref,
    all_ref: Ref,
    grad_ref: Ref,
    *,
    silu: bool,
    num_tokens: int,
) -> None:
    compute, margin, size = all_ref.dtype, before_ref.shape[2], x_ref.shape[1]
    W = taps_ref.shape[0]
    taps = taps_ref[...].astype(compute)
    start = pl.program_id(2) * size
    left = num_tokens - start
    token = jax.lax.broadcasted_iota(jnp.int32, (size, 1), 0)
    # The last block may reach past the last token, where anything may stand.
    all_ref[:margin] = before_ref[0, 0].astype(compute)
    all_ref[pl.ds(margin, size)] = jnp.where(token < left, x_ref[0].astype(compute), 0.0)
    all_ref[margin + size :] = after_ref[0, 0].astype(compute)
    grad_ref[pl.ds(0, size)] = jnp.where(token < left, grad_y_ref[0].astype(compute), 0.0)
    grad_ref[size:] = grad_after_ref[0, 0].astype(compute)
    if silu:
        y = bias_ref[...].astype(compute)
        for j in range(W):
            y = y + taps[j : j + 1] * all_ref[pl.ds(margin - (W - 1) + j, size + margin)]
        grad_ref[...] = grad_ref[...] * _silu_slope(y)
    grad_x = jnp.zeros((size, taps.shape[1]), compute)
    for j in range(W):
        grad_x = grad_x + taps[j : j + 1] * grad_ref[pl.ds(W - 1 - j, size)]
    grad_x_ref[0] = grad_x.astype(grad_x_ref.dtype)

    @pl.when((pl.program_id(1) == 0) & (pl.program_id(2) == 0))
    def _() -> None:
        grad_taps_ref[...] = jnp.zeros(grad_taps_ref.shape, compute)
        grad_bias_ref[...] = jnp.zeros(grad_bias_ref.shape, compute)

    grad = grad_ref[pl.ds(0, size)]
    for j in range(W):
        product = grad * all_ref[pl.ds(margin - (W - 1) + j, size)]
        grad_taps_ref[pl.ds(j, 1)] += jnp.sum(product, axis=0, keepdims=True)
    grad_bias_ref[...] += jnp.sum(grad, axis=0, keepdims=True)
