import pytest
import torch

from lme_kernels.functional import gated_delta_rule
from lme_kernels.packing import cu_seqlens_from_lengths
from lme_kernels.testing import assert_matches

# Empty sequences at both ends and in the middle; one past a chunk, one that fills it.
LENGTHS = [0, 5, 4, 0, 9, 0]
T, N, K, V = 18, 4, 3, 5


def double(*shape):
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def between_zero_and(bound, *shape):
    return (torch.rand(shape, dtype=torch.float64) * bound).requires_grad_()


def naive(query, key, value, log_decay, beta, state, scale, normalize):
    """One sequence, token by token; shapes (S, heads, ...) and (N, K, V)."""
    if normalize:
        query, key = (
            each / (each.square().sum(-1, keepdim=True) + 1e-6).sqrt() for each in (query, key)
        )
    query, key, value = (
        each.repeat_interleave(N // each.shape[1], 1) for each in (query, key, value)
    )
    outputs = []
    for t in range(query.shape[0]):
        k, b = key[t].unsqueeze(-1), beta[t].reshape(N, 1, 1)
        erase = torch.eye(K, dtype=k.dtype) - b * k @ k.mT
        state = log_decay[t].exp().reshape(N, 1, 1) * erase @ state + b * k @ value[t].unsqueeze(-2)
        outputs.append(scale * (query[t].unsqueeze(-2) @ state).squeeze(-2))
    return (torch.stack(outputs) if outputs else value.new_zeros((0, N, V))), state


def assert_same(ours, theirs, inputs):
    weights = [torch.randn_like(each) for each in ours]
    of_ours = torch.autograd.grad(ours, inputs, weights)
    of_theirs = torch.autograd.grad(theirs, inputs, weights)
    for mine, other in zip((*ours, *of_ours), (*theirs, *of_theirs), strict=True):
        assert_matches(mine, other)


@pytest.mark.parametrize("normalize", [True, False])
def test_packed_sequences_are_loops_over_tokens(normalize):
    query, key, value = double(T, 2, K), double(T, 2, K), double(T, N, V)
    log_decay = (-torch.rand(T, N, dtype=torch.float64)).requires_grad_()
    # Above 1 the eigenvalue along the key is negative.
    beta, initial = between_zero_and(2, T, N), double(6, N, K, V)
    ours = gated_delta_rule(
        query,
        key,
        value,
        log_decay,
        beta,
        scale=0.7,
        l2_normalize=normalize,
        initial_state=initial,
        return_final_state=True,
        cu_seqlens=cu_seqlens_from_lengths(torch.tensor(LENGTHS)),
        chunk_size=4,
    )
    parts = zip(
        *(each.split(LENGTHS) for each in (query, key, value, log_decay, beta)),
        initial,
        strict=True,
    )
    results = [naive(*part, 0.7, normalize) for part in parts]
    theirs = (torch.cat([y for y, _ in results]), torch.stack([state for _, state in results]))
    assert_same(ours, theirs, (query, key, value, log_decay, beta, initial))


@pytest.mark.parametrize("S", [1, 9])
def test_a_batch_is_one_sequence_a_row(S):
    query, key, value = double(2, S, 2, K), double(2, S, 1, K), double(2, S, 4, V)
    log_decay = (-torch.rand(2, S, N, dtype=torch.float64)).requires_grad_()
    beta = between_zero_and(1, 2, S, N)
    inputs = (query, key, value, log_decay, beta)
    ours = gated_delta_rule(*inputs, return_final_state=True, chunk_size=4)
    zeros = torch.zeros(N, K, V, dtype=torch.float64)
    results = [naive(*row, zeros, K**-0.5, True) for row in zip(*inputs, strict=True)]
    theirs = tuple(torch.stack(each) for each in zip(*results, strict=True))
    assert_same(ours, theirs, inputs)


def test_a_token_written_twice_is_remembered_once():
    key = torch.tensor([[[[1.0, 0.0]], [[1.0, 0.0]]]])
    value = torch.tensor([[[[2.0]], [[3.0]]]])
    ones = torch.ones(1, 2, 1)
    y = gated_delta_rule(key, key, value, ones * 0.0, ones, scale=1.0, l2_normalize=False)
    # The second write replaces the first.
    assert y.flatten().tolist() == [2.0, 3.0]


def test_no_token_keeps_the_state():
    query, initial = torch.randn(2, 0, 2, K), torch.randn(2, 2, K, V)
    y, state = gated_delta_rule(
        query,
        query,
        torch.randn(2, 0, 2, V),
        torch.randn(2, 0, 2),
        torch.randn(2, 0, 2),
        initial_state=initial,
        return_final_state=True,
    )
    assert y.shape == (2, 0, 2, V)
    assert torch.equal(state, initial)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"log_decay": torch.randn(1, 4, 3)}, "heads, which do not divide the largest, 4"),
        ({"beta": torch.randn(1, 4, 1)}, "`beta` must have shape"),
        ({"key": torch.randn(1, 4, 4, 2)}, "`key` must have shape"),
        ({"beta": torch.ones(1, 4, 4).long()}, "`beta` must be floating-point"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change, message):
    arguments = {
        "query": torch.randn(1, 4, 4, K),
        "key": torch.randn(1, 4, 4, K),
        "value": torch.randn(1, 4, 4, V),
        "log_decay": torch.randn(1, 4, 4),
        "beta": torch.randn(1, 4, 4),
    }
    with pytest.raises(ValueError, match=message):
        gated_delta_rule(**{**arguments, **change})
