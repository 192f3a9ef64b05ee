"""Linear attention with decay in Pallas."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from lme_kernels.pallas.blocks import compute_dtype, resolve_interpret
from lme_kernels.pallas.linear_attention_chunks import Order, Tokens, Walk, attend_chunks
from lme_kernels.pallas.packing import check_cu_seqlens, sequence_ids

# The products of a chunk have an extra dimension when each channel decays by itself.
CHANNEL_CHUNK = 16


def linear_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    log_decay: Array | None = None,
    scale: float | None = None,
    initial_state: Array | None = None,
    return_final_state: bool = False,
    cu_seqlens: Array | None = None,
    chunk_size: int = 64,
    inclusive: bool = True,
    interpret: bool | None = None,
) -> Array | tuple[Array, Array]:
    """Run `H_t = exp(log_decay_t) H_{t-1} + k_t v_t^T` and read `y_t = scale * q_t H_t`.

    A token sees itself; with `inclusive=False` it reads the state before it, `H_{t-1}`. The number
    of heads N is the largest of the three arrays'; one with fewer serves groups of heads that
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
        cu_seqlens: Starts of the packed sequences and T at the end, shape (sequences + 1,), an
            integer dtype; sequences may be empty. `None` if not packed.
        chunk_size: Tokens that are multiplied at once; it changes rounding, memory and time, not
            the result. At most `CHANNEL_CHUNK` are when each channel decays by itself.
        inclusive: Whether a token sees itself.
        interpret: Whether to run the kernel as plain jax operations; `None` does so unless a TPU is
            there.

    Returns:
        All `y_t`, shape (B, S, N, V) or (T, N, V), dtype of `query`; and with `return_final_state`
        the last state of each sequence, shape (sequences, N, K, V), dtype of `initial_state`, or of
        `query` without one: of an empty sequence the initial one. States are carried in at least
        float32.

    Raises:
        ValueError: If shapes or dtypes do not fit or an option is out of range.

    Source: Katharopoulos et al. 2020, equations 16 to 18 (arXiv:2006.16236), without the
    normaliser; decay and chunks as in Yang et al. 2024, section 4 (arXiv:2312.06635).
    """
    inputs = {"query": query, "key": key, "value": value}
    sequences, N = _check(inputs, log_decay, initial_state, cu_seqlens, chunk_size)
    K, V = query.shape[-1], value.shape[-1]
    compute = compute_dtype(query.dtype)
    initial = jnp.zeros((sequences, N, K, V), compute) if initial_state is None else initial_state
    tokens = query.shape[: 2 if cu_seqlens is None else 1]
    if 0 in tokens:
        y, final = jnp.zeros((*tokens, N, V), query.dtype), initial
    else:
        if log_decay is None:
            log_decay = jnp.zeros((*tokens, N), compute)
        per_channel = log_decay.ndim == query.ndim
        size = min(chunk_size, CHANNEL_CHUNK) if per_channel else chunk_size
        cut = _cut(query, cu_seqlens, size)
        step = cut.split(log_decay.astype(compute))
        # One a head: a row, (chunks, N, 1, size). One a channel: (chunks, N, size, K).
        step = step if per_channel else step[:, :, None]
        walk = Walk(
            scale=K**-0.5 if scale is None else scale,
            inclusive=inclusive,
            per_channel=per_channel,
            interpret=resolve_interpret(interpret),
        )
        q, k, v = (cut.split(each) for each in (query, key, value))
        chunks = Tokens(q, k, v, step)
        y, final = attend_chunks(chunks, initial, cut.order, walk)
        y = cut.merge(y)
    final = final.astype(query.dtype if initial_state is None else initial_state.dtype)
    return (y, final) if return_final_state else y


class _Chunks(NamedTuple):
    """Which tokens each chunk has; chunks of a sequence follow each other."""

    order: Order
    """Sequences of the chunks."""
    token: Array | None
    """Token at each place of each chunk, shape (chunks, size); the number of tokens if none. `None`
    if the sequences are rows."""
    origin: Array | None
    """Place of each token among those of the chunks, shape (tokens,); `None` if rows."""
    tokens: tuple[int, ...]
    """Shape of the tokens: (B, S), or (T,) if packed."""
    size: int
    """Tokens of a chunk."""

    def split(self, x: Array) -> Array:
        """Cut (*tokens, heads, ...) to (chunks, heads, size, ...), zeros where no token is."""
        if self.token is None:
            B, S = self.tokens
            pads = self.order.owner.shape[0] // B * self.size - S
            x = jnp.pad(x, ((0, 0), (0, pads), *((0, 0) for _ in x.shape[2:])))
            x = x.reshape(self.order.owner.shape[0], self.size, *x.shape[2:])
        else:
            x = jnp.concatenate((x, jnp.zeros((1, *x.shape[1:]), x.dtype)))[self.token]
        return jnp.moveaxis(x, 2, 1)

    def merge(self, y: Array) -> Array:
        """Undo `split`."""
        y = jnp.moveaxis(y, 1, 2)
        if self.origin is not None:
            return y.reshape(-1, *y.shape[2:])[self.origin]
        B, S = self.tokens
        return y.reshape(B, -1, *y.shape[2:])[:, :S]


def _cut(x: Array, cu_seqlens: Array | None, size: int) -> _Chunks:
    if cu_seqlens is not None:
        return _cut_packed(x, cu_seqlens, size)
    B, S = x.shape[:2]
    count = -(-S // size)
    chunk = jnp.arange(B * count, dtype=jnp.int32)
    return _Chunks(Order(chunk // count, chunk % count), None, None, (B, S), size)


def _cut_packed(x: Array, cu_seqlens: Array, size: int) -> _Chunks:
    T = x.shape[0]
    offsets = cu_seqlens.astype(jnp.int32)
    counts = (jnp.diff(offsets) + size - 1) // size
    first = jnp.concatenate((jnp.zeros(1, jnp.int32), jnp.cumsum(counts, dtype=jnp.int32)))
    # As many chunks as there can be.
    chunk = jnp.arange(T // size + counts.shape[0], dtype=jnp.int32)
    owner = jnp.searchsorted(first, chunk, side="right").astype(jnp.int32) - 1
    place = chunk - first[owner]
    start = offsets[owner] + place * size
    end = jnp.concatenate((offsets, jnp.zeros(1, jnp.int32)))[owner + 1]
    column = jnp.arange(size, dtype=jnp.int32)
    index = jnp.where(start[:, None] + column < end[:, None], start[:, None] + column, T)
    token_owner = sequence_ids(offsets, T)
    token = jnp.arange(T, dtype=jnp.int32)
    origin = first[token_owner] * size + token - offsets[token_owner]
    return _Chunks(Order(owner, place), index, origin, (T,), size)


def _check(
    inputs: dict[str, Array],
    log_decay: Array | None,
    initial_state: Array | None,
    cu_seqlens: Array | None,
    chunk_size: int,
) -> tuple[int, int]:
    """Check shapes, dtypes and options; return the numbers of sequences and heads."""
    leading, tokens = (2, "(B, S,") if cu_seqlens is None else (1, "(T,")
    query, key, value = inputs.values()
    for name, each in inputs.items():
        if each.ndim != leading + 2 or each.shape[:leading] != query.shape[:leading]:
            raise ValueError(
                f"`{name}` must have shape {tokens} heads, channels) with the tokens of `query`, got "
                f"{each.shape}; `cu_seqlens` goes with packed tokens and nothing else"
            )
        if each.dtype != query.dtype or not jnp.issubdtype(each.dtype, jnp.floating):
            raise ValueError(
                f"`{name}` must have the floating-point dtype of `query`, got {each.dtype} and "
                f"{query.dtype}"
            )
    heads = {name: each.shape[-2] for name, each in inputs.items()}
    N = max(heads.values())
    for name, count in heads.items():
        if count == 0 or N % count:
            raise ValueError(f"`{name}` has {count} heads, which do not divide the largest, {N}")
    sequences = query.shape[0] if cu_seqlens is None else check_cu_seqlens(cu_seqlens)
    of_tokens, K = query.shape[:leading], query.shape[-1]
    _check_shape("key", key, [(*of_tokens, heads["key"], K)])
    _check_shape("log_decay", log_decay, [(*of_tokens, N), (*of_tokens, N, K)])
    _check_shape("initial_state", initial_state, [(sequences, N, K, value.shape[-1])])
    if chunk_size < 1:
        raise ValueError(f"`chunk_size` must be at least 1, got {chunk_size}")
    return sequences, N


def _check_shape(name: str, x: Array | None, shapes: list[tuple[int, ...]]) -> None:
    if x is None:
        return
    if x.shape not in shapes:
        wanted = " or ".join(str(each) for each in shapes)
        raise ValueError(f"`{name}` must have shape {wanted}, got {x.shape}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"`{name}` must be floating-point, got {x.dtype}")
