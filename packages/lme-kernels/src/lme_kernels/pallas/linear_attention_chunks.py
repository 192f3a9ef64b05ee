"""The chunks of linear attention, one after the other with the state on chip, in Pallas.

In a chunk, with a_t the sum of log decays up to token t (`until`), b_t the same or without token t
(`reached`), e the sum of all, S the state before it:

    P_ts = scale q_t . (k_s * exp(b_t - a_s)) for the s that t sees
    y    = P v + (scale q * exp(b)) S
    S'   = exp(e) S + (k * exp(e - a))^T v

The log decay of a token acts on four things: S on its way out of the chunk, S on its way to later
queries, earlier keys on their way out, and pairs of an earlier key and a later query. Its gradient
is the sum of each by itself; differences of longer sums would round more.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, Ref
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lme_kernels.pallas.blocks import compute_dtype


class Walk(NamedTuple):
    """Options that do not change from chunk to chunk."""

    scale: float
    """Factor of the queries."""
    inclusive: bool
    """Whether a token sees itself."""
    per_channel: bool
    """Whether each row of the state decays by itself."""
    interpret: bool
    """Whether the kernels are interpreted."""


class Tokens(NamedTuple):
    """The tokens of all sequences in chunks, those of a sequence one after the other."""

    query: Array
    """Shape (chunks, heads, C, K), zeros where there is no token."""
    key: Array
    """Shape (chunks, heads, C, K), dtype of `query`."""
    value: Array
    """Shape (chunks, heads, C, V), dtype of `query`."""
    step: Array
    """Log decays, shape (chunks, N, 1, C), one a head, or (chunks, N, C, K), in at least float32."""


class Order(NamedTuple):
    """Which sequence each chunk belongs to."""

    owner: Array
    """Sequence of each chunk, shape (chunks,), int32; the number of sequences for chunks without
    tokens, which come last."""
    place: Array
    """Number of chunks of the same sequence before it, shape (chunks,), int32."""


def attend_chunks(tokens: Tokens, initial: Array, order: Order, walk: Walk) -> tuple[Array, Array]:
    """Compute all chunks of all sequences; can be differentiated.

    Args:
        tokens: Tokens and decays in chunks.
        initial: State before each sequence, shape (sequences, N, K, V).
        order: Sequences of the chunks.
        walk: Options.

    Returns:
        What the tokens read, shape (chunks, N, C, V), dtype of the query, and the state after each
        sequence, shape (sequences, N, K, V), in at least float32.
    """
    return _attend(tokens, initial, order, walk)


def _attend_primal(tokens: Tokens, initial: Array, order: Order, walk: Walk) -> tuple[Array, Array]:
    y, final, _ = _run_forward(tokens, initial, order, walk)
    return y, final


class _Saved(NamedTuple):
    tokens: Tokens
    initial: Array
    order: Order
    before: Array
    """State before each chunk, shape (chunks, N, K, V)."""


def _attend_forward(
    tokens: Tokens, initial: Array, order: Order, walk: Walk
) -> tuple[tuple[Array, Array], _Saved]:
    y, final, before = _run_forward(tokens, initial, order, walk)
    return (y, final), _Saved(tokens, initial, order, before)


def _attend_backward(
    walk: Walk, saved: _Saved, grads: tuple[Array, Array]
) -> tuple[Tokens, Array, None]:
    gradients, grad_initial = _run_backward(saved, *grads, walk)
    # The sequence and place of a chunk are integers and have none.
    return gradients, grad_initial, None


_attend = jax.custom_vjp(_attend_primal, nondiff_argnums=(3,))
_attend.defvjp(_attend_forward, _attend_backward)


def _blocks(
    x: Array | jax.ShapeDtypeStruct, N: int, chunk: Callable[[Array], Array]
) -> pl.BlockSpec:
    """The part of (chunks, heads, rows, columns) for one chunk and one of N heads."""
    group = N // x.shape[1]

    def index(n: Array, m: Array, owner: Ref, place: Ref) -> tuple[Array | int, ...]:
        # `//` rounds down, which asks what TPU there is when it is lowered.
        return chunk(m), jax.lax.div(n, n.dtype.type(group)), 0, 0

    return pl.BlockSpec((1, 1, *x.shape[2:]), index)


def _empty(owner: Array, sequences: int) -> Array:
    """Whether each sequence has no chunk, shape (sequences, 1, 1, 1)."""
    counts = jnp.zeros(sequences, jnp.int32).at[owner].add(1, mode="drop")
    return (counts == 0)[:, None, None, None]


def _with_spare(states: Array) -> Array:
    """Add a state of zeros for the chunks that have no token."""
    return jnp.concatenate((states, jnp.zeros((1, *states.shape[1:]), states.dtype)))


def _sums(step: Array, walk: Walk) -> tuple[Array, Array]:
    """Sum the log decays up to what each token reads, and up to and with each token."""
    until = jnp.cumsum(step, axis=2 if walk.per_channel else 3)
    return until if walk.inclusive else until - step, until


def _run_forward(
    tokens: Tokens, initial: Array, order: Order, walk: Walk
) -> tuple[Array, Array, Array]:
    """Return what tokens read, the final states, and the states before chunks."""
    M, _, C, _ = tokens.query.shape
    sequences, N, K, V = initial.shape
    compute = compute_dtype(tokens.query.dtype)

    def same(m: Array) -> Array:
        return m

    inputs = (*tokens[:3], *_sums(tokens.step, walk))
    state = pl.BlockSpec((1, 1, K, V), lambda n, m, owner, place: (owner[m], n, 0, 0))
    out_y = jax.ShapeDtypeStruct((M, N, C, V), tokens.query.dtype)
    out_before = jax.ShapeDtypeStruct((M, N, K, V), compute)
    y, final, before = pl.pallas_call(
        partial(_forward_kernel, walk=walk),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(N, M),
            in_specs=[*(_blocks(each, N, same) for each in inputs), state],
            out_specs=[_blocks(out_y, N, same), state, _blocks(out_before, N, same)],
            scratch_shapes=[pltpu.VMEM((K, V), compute)],
        ),
        out_shape=[out_y, jax.ShapeDtypeStruct((sequences + 1, N, K, V), compute), out_before],
        interpret=walk.interpret,
    )(*order, *inputs, _with_spare(initial))
    final = jnp.where(_empty(order.owner, sequences), initial.astype(compute), final[:-1])
    return y, final, before


def _run_backward(
    saved: _Saved, grad_y: Array, grad_final: Array, walk: Walk
) -> tuple[Tokens, Array]:
    """Return the gradients of the tokens and of the initial states."""
    tokens, order = saved.tokens, saved.order
    M = order.owner.shape[0]
    sequences, N, K, V = saved.initial.shape
    compute = compute_dtype(tokens.query.dtype)

    def backwards(m: Array) -> Array:
        return M - 1 - m

    state = pl.BlockSpec((1, 1, K, V), lambda n, m, owner, place: (owner[M - 1 - m], n, 0, 0))
    # A gradient a head; those of shared heads are summed afterwards.
    outputs = [
        jax.ShapeDtypeStruct((M, N, *each.shape[2:]), each.dtype if each.shape[1] == N else compute)
        for each in tokens
    ]
    inputs = (*tokens[:3], *_sums(tokens.step, walk), saved.before, grad_y)
    *gradients, grad_initial = pl.pallas_call(
        partial(_backward_kernel, walk=walk),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(N, M),
            in_specs=[*(_blocks(each, N, backwards) for each in inputs), state],
            out_specs=[*(_blocks(each, N, backwards) for each in outputs), state],
            scratch_shapes=[pltpu.VMEM((K, V), compute)],
        ),
        out_shape=[*outputs, jax.ShapeDtypeStruct((sequences + 1, N, K, V), compute)],
        interpret=walk.interpret,
    )(*order, *inputs, _with_spare(grad_final))
    summed = [
        each
        if each.shape == x.shape
        else each.reshape(M, x.shape[1], -1, *x.shape[2:]).sum(2).astype(x.dtype)
        for each, x in zip(gradients, tokens, strict=True)
    ]
    grad_initial = jnp.where(_empty(order.owner, sequences), grad_final, grad_initial[:-1])
    return Tokens(*summed), grad_initial.astype(saved.initial.dtype)


def _dot(a: Array, b: Array, contract: tuple[int, int]) -> Array:
    """Multiply matrices over dim `contract[0]` of `a` and `contract[1]` of `b`, exactly."""
    return jax.lax.dot_general(
        a,
        b,
        (((contract[0],), (contract[1],)), ((), ())),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=a.dtype,
    )


def _column(row: Array) -> Array:
    """Turn (1, C) into (C, 1); the sum has one term, and so is exact."""
    C = row.shape[1]
    return jnp.sum(jnp.where(_equal(C), row, 0.0), axis=1, keepdims=True)


def _row(column: Array) -> Array:
    """Turn (C, 1) into (1, C)."""
    return jnp.sum(jnp.where(_equal(column.shape[0]), column, 0.0), axis=0, keepdims=True)


def _equal(C: int) -> Array:
    rows, columns = (jax.lax.broadcasted_iota(jnp.int32, (C, C), dim) for dim in (0, 1))
    return rows == columns


class _Factors(NamedTuple):
    """What decay multiplies with in one chunk of one head."""

    between: Array
    """From one token to another that sees it, else 0: (C, C), or (C, C, K) a channel."""
    reached: Array
    """From before the chunk to what a token reads: (C, 1) or (C, K)."""
    left: Array
    """From a token to the end of the chunk: (C, 1) or (C, K)."""
    whole: Array
    """Over the chunk: (1, 1) or (K, 1)."""


def _factors(reached: Array, until: Array, C: int, walk: Walk) -> _Factors:
    if walk.per_channel:
        end = until[C - 1 :]
        whole, shape = _column(jnp.exp(end)), (C, *until.shape)
        difference = reached[:, None, :] - until[None, :, :]
    else:
        end = until[:, C - 1 :]
        whole, shape = jnp.exp(end), (C, C)
        reached = _column(reached)
        difference = reached - until
        until = _column(until)
    seen = _seen(shape, walk.inclusive)
    # Where it would be positive, and might overflow, nothing is seen.
    between = jnp.where(seen, jnp.exp(jnp.where(seen, difference, 0.0)), 0.0)
    return _Factors(between, jnp.exp(reached), jnp.exp(end - until), whole)


def _seen(shape: tuple[int, ...], inclusive: bool) -> Array:
    """Whether the token of the first dim sees that of the second."""
    first, second = (jax.lax.broadcasted_iota(jnp.int32, shape, dim) for dim in (0, 1))
    return first >= second if inclusive else first > second


def _forward_kernel(
    owner_ref: Ref,
    place_ref: Ref,
    query_ref: Ref,
    key_ref: Ref,
    value_ref: Ref,
    reached_ref: Ref,
    until_ref: Ref,
    initial_ref: Ref,
    y_ref: Ref,
    final_ref: Ref,
    before_ref: Ref,
    state_ref: Ref,
    *,
    walk: Walk,
) -> None:
    compute = state_ref.dtype

    @pl.when(place_ref[pl.program_id(1)] == 0)
    def _() -> None:
        state_ref[...] = initial_ref[0, 0].astype(compute)

    query, key, value = (each[0, 0].astype(compute) for each in (query_ref, key_ref, value_ref))
    query = query * walk.scale
    factors = _factors(reached_ref[0, 0], until_ref[0, 0], query.shape[0], walk)
    if walk.per_channel:
        scores = jnp.sum(query[:, None, :] * key[None, :, :] * factors.between, axis=-1)
    else:
        scores = _dot(query, key, (1, 1)) * factors.between
    state = state_ref[...]
    y = _dot(scores, value, (1, 0)) + _dot(query * factors.reached, state, (1, 0))
    y_ref[0, 0] = y.astype(y_ref.dtype)
    before_ref[0, 0] = state
    state = state * factors.whole + _dot(key * factors.left, value, (0, 0))
    state_ref[...] = state
    final_ref[0, 0] = state


def _backward_kernel(
    owner_ref: Ref,
    place_ref: Ref,
    query_ref: Ref,
    key_ref: Ref,
    value_ref: Ref,
    reached_ref: Ref,
    until_ref: Ref,
    before_ref: Ref,
    grad_y_ref: Ref,
    grad_final_ref: Ref,
    grad_query_ref: Ref,
    grad_key_ref: Ref,
    grad_value_ref: Ref,
    grad_step_ref: Ref,
    grad_initial_ref: Ref,
    grad_state_ref: Ref,
    *,
    walk: Walk,
) -> None:
    compute = grad_state_ref.dtype
    last = pl.num_programs(1) - 1
    chunk = last - pl.program_id(1)
    ends = (chunk == last) | (place_ref[jnp.minimum(chunk + 1, last)] == 0)

    @pl.when(ends)
    def _() -> None:
        grad_state_ref[...] = grad_final_ref[0, 0].astype(compute)

    query, key, value, grad_y = (
        each[0, 0].astype(compute) for each in (query_ref, key_ref, value_ref, grad_y_ref)
    )
    query = query * walk.scale
    C = query.shape[0]
    factors = _factors(reached_ref[0, 0], until_ref[0, 0], C, walk)
    before, grad_after = before_ref[0, 0], grad_state_ref[...]

    grad_scores = _dot(grad_y, value, (1, 1))
    # A token's pair with itself does not decay: it joins when the decays' gradient has been taken.
    alone = jnp.sum(jnp.where(_equal(C), grad_scores, 0.0), axis=1, keepdims=True)
    between = jnp.where(_seen(factors.between.shape, False), factors.between, 0.0)
    if walk.per_channel:
        spread = grad_scores[:, :, None] * between
        scores = jnp.sum(query[:, None, :] * key[None, :, :] * factors.between, axis=-1)
        grad_query = jnp.sum(spread * key[None, :, :], axis=1)
        grad_key = jnp.sum(spread * query[:, None, :], axis=0)
        pairs = _after(query * grad_query, walk.inclusive) - _after(key * grad_key, True)
    else:
        products = _dot(query, key, (1, 1))
        scores = products * factors.between
        grad_products = grad_scores * between
        grad_query = _dot(grad_products, key, (1, 0))
        grad_key = _dot(grad_products, query, (0, 0))
        later = _after(products * grad_products, walk.inclusive)
        pairs = _row(jnp.sum(jnp.where(_seen((C, C), False), later, 0.0), axis=1, keepdims=True))
    kept, read = key * factors.left, query * factors.reached
    grad_value = _dot(scores, grad_y, (0, 0)) + _dot(kept, grad_after, (1, 0))
    grad_kept, grad_read = _dot(value, grad_after, (1, 1)), _dot(grad_y, before, (1, 1))
    grad_before = grad_after * factors.whole + _dot(read, grad_y, (0, 0))

    out = jnp.sum(before * grad_after, axis=1, keepdims=True) * factors.whole
    to_queries, from_keys = read * grad_read, kept * grad_kept
    if walk.per_channel:
        earlier = _dot(_seen((C, C), False).astype(compute), from_keys, (1, 0))
        grad_step = _row(out) + earlier + _after(to_queries, walk.inclusive) + pairs
    else:
        to_queries, from_keys = (
            jnp.sum(each, axis=1, keepdims=True) for each in (to_queries, from_keys)
        )
        seen = _seen((C, C), walk.inclusive)
        to_later = jnp.sum(jnp.where(seen, to_queries, 0.0), axis=0, keepdims=True)
        earlier = jnp.where(_seen((C, C), False), _row(from_keys), 0.0)
        earlier = _row(jnp.sum(earlier, axis=1, keepdims=True))
        grad_step = jnp.sum(out, keepdims=True) + earlier + to_later + pairs
    grad_step_ref[0, 0] = grad_step

    grad_query = grad_query + grad_read * factors.reached
    grad_key = grad_key + grad_kept * factors.left
    if walk.inclusive:
        grad_query = grad_query + alone * key
        grad_key = grad_key + alone * query
    grad_query_ref[0, 0] = (grad_query * walk.scale).astype(grad_query_ref.dtype)
    grad_key_ref[0, 0] = grad_key.astype(grad_key_ref.dtype)
    grad_value_ref[0, 0] = grad_value.astype(grad_value_ref.dtype)
    grad_state_ref[...] = grad_before
    grad_initial_ref[0, 0] = grad_before


def _after(x: Array, inclusive: bool) -> Array:
    """Sum the rows from each row of (C, ...) on, with it or without."""
    seen = _seen((x.shape[0], x.shape[0]), inclusive)
    return _dot(seen.astype(x.dtype), x, (0, 0))
