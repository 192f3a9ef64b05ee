"""The jax functions past one block, against definitions written in jax; and what they refuse."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest

from lme_kernels import pallas


@pytest.fixture(autouse=True)
def _float64():
    """float64 arrays, which jax leaves out unless asked."""
    with jax.enable_x64(True):
        yield


def swiglu(gate, up):
    return gate / (1 + jnp.exp(-gate)) * up


def rmsnorm(x, weight):
    return x / jnp.sqrt((x**2).sum(-1, keepdims=True) / x.shape[-1] + 1e-5) * weight


def causal_conv1d(x, weight, bias, initial):
    both = jnp.concatenate((initial, x.swapaxes(1, 2)), 2)
    window = jnp.arange(x.shape[1])[:, None] + jnp.arange(weight.shape[1])
    y = (both[:, :, window] * weight[:, None]).sum(-1)
    return (jax.nn.silu(y + bias[:, None])).swapaxes(1, 2), both[:, :, x.shape[1] :]


def linear_attention(query, key, value, log_decay, initial, inclusive=True):
    """One token after the other; a head of the query, key and log decay serves two of the value."""

    def step(state, token):
        q, k, v, g = token
        new = jnp.exp(g).reshape(*g.shape[:2], -1, 1) * state + k[..., None] * v[..., None, :]
        return new, 0.5 * jnp.einsum("bnk,bnkv->bnv", q, new if inclusive else state)

    q, k = (jnp.repeat(each, 2, 2) for each in (query, key))
    tokens = [each.swapaxes(0, 1) for each in (q, k, value, log_decay)]
    final, y = jax.lax.scan(step, initial, tokens)
    return y.swapaxes(0, 1), final


def with_states(x, weight, bias, initial):
    return pallas.causal_conv1d(
        x, weight, bias, activation="silu", initial_state=initial, return_final_state=True
    )


def with_decay(query, key, value, log_decay, initial, inclusive=True):
    return pallas.linear_attention(
        query,
        key,
        value,
        log_decay=log_decay,
        initial_state=initial,
        return_final_state=True,
        inclusive=inclusive,
        scale=0.5,
        chunk_size=32,
    )


HEAD = ((2, 70, 2, 6), (2, 70, 2, 6), (2, 70, 4, 5), (2, 70, 4), (2, 4, 6, 5))
CHANNEL = (*HEAD[:3], (2, 70, 4, 6), HEAD[4])
CASES = {
    # One or two blocks and a bit along each dim.
    "swiglu": (pallas.swiglu, swiglu, ((300, 1030), (300, 1030))),
    "rmsnorm": (partial(pallas.rmsnorm, eps=1e-5), rmsnorm, ((530, 24), (24,))),
    "convolution": (with_states, causal_conv1d, ((2, 530, 260), (260, 4), (260,), (2, 260, 3))),
    # One tap more than there are rows in a register.
    "many taps": (with_states, causal_conv1d, ((1, 530, 8), (8, 10), (8,), (1, 8, 9))),
    "decay a head": (with_decay, linear_attention, HEAD),
    "decay a channel, before itself": (
        partial(with_decay, inclusive=False),
        partial(linear_attention, inclusive=False),
        CHANNEL,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_many_blocks_give_what_the_definition_gives(name):
    ours, theirs, shapes = CASES[name]
    keys = jax.random.split(jax.random.key(0), len(shapes) + 2)
    inputs = [jax.random.normal(*each) for each in zip(keys, shapes, strict=False)]
    if "decay" in name:
        inputs[3] = -jnp.abs(inputs[3])

    @partial(jax.jit, static_argnums=0)
    def differentiate(function, inputs):
        outputs, pull = jax.vjp(function, *inputs)
        leaves, structure = jax.tree.flatten(outputs)
        weights = [jax.random.normal(k, x.shape) for k, x in zip(keys[-2:], leaves, strict=False)]
        return outputs, pull(jax.tree.unflatten(structure, weights))

    for mine, other in zip(
        *(jax.tree.leaves(differentiate(each, inputs)) for each in (ours, theirs)), strict=True
    ):
        # Sums over tokens in another order; gradients of weights have the largest.
        assert jnp.abs(mine - other).max() < 1e-11 * (1 + jnp.abs(other).max())


def test_a_strong_decay_does_not_overflow():
    query, key, value = jnp.ones((3, 1, 64, 1, 4))
    decay = jnp.full((1, 64, 1), -300.0)

    def total(*inputs):
        return with_decay(*inputs, jnp.zeros((1, 1, 4, 4)))[0].sum()

    y, grads = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2, 3)))(query, key, value, decay)
    # Nothing is left of the past: 0.5 (q . k) v for each of 64 tokens and 4 channels.
    assert jnp.allclose(y, 0.5 * 4 * 64 * 4)
    assert all(jnp.isfinite(each).all() for each in grads)


def of(*shape, dtype=jnp.float32):
    return jnp.zeros(shape, dtype)


CU = of(3, dtype=jnp.int32)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pallas.swiglu(of(2, 3), of(3, 2)), "`up` must have the shape"),
        (lambda: pallas.rmsnorm(of(2, 3), of(2)), r"`weight` must have shape \(3,\)"),
        (lambda: pallas.causal_conv1d(of(4, 3), of(3, 2)), r"got \(4, 3\) without it"),
        (lambda: pallas.causal_conv1d(of(1, 4, 3), of(2, 2)), r"`weight` must have shape \(3, W\)"),
        (lambda: pallas.causal_conv1d(of(1, 4, 3), of(3, 2), of(2)), "`bias` must have shape"),
        (
            lambda: pallas.causal_conv1d(of(1, 4, 3), of(3, 2), initial_state=of(1, 3, 2)),
            "`initial_state` must have shape",
        ),
        (
            lambda: pallas.causal_conv1d(of(1, 4, 3), of(3, 2), activation="gelu"),
            "`activation` must be",
        ),
        (
            lambda: pallas.causal_conv1d(of(4, 3), of(3, 2), cu_seqlens=of(3)),
            "`cu_seqlens` must have an integer dtype",
        ),
        (
            lambda: pallas.linear_attention(*of(3, 4, 2, 3), cu_seqlens=of(3, 1, dtype=jnp.int32)),
            "`cu_seqlens` must have shape",
        ),
        (lambda: pallas.linear_attention(*of(3, 4, 2, 3)), "must have shape .B, S, heads"),
        (
            lambda: pallas.linear_attention(
                of(1, 4, 3, 3), of(1, 4, 2, 3), of(1, 4, 3, 3), chunk_size=2
            ),
            "`key` has 2 heads, which do not divide the largest, 3",
        ),
        (
            lambda: pallas.linear_attention(*of(3, 1, 4, 2, 3), log_decay=of(1, 4, 3)),
            "`log_decay` must have shape",
        ),
        (
            lambda: pallas.linear_attention(*of(3, 1, 4, 2, 3), chunk_size=0),
            "`chunk_size` must be at least 1",
        ),
        (
            lambda: pallas.linear_attention(*of(2, 1, 4, 2, 3), of(1, 4, 2, 3, dtype=jnp.float64)),
            "`value` must have the floating-point dtype",
        ),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
