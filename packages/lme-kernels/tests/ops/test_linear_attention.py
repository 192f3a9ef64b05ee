import pytest
import torch

from lme_kernels.functional import linear_attention
from lme_kernels.ops.linear_attention import LINEAR_ATTENTION
from lme_kernels.ops.linear_attention.settings import ChunkSettings, using_chunks
from lme_kernels.packing import cu_seqlens_from_lengths
from lme_kernels.testing import (
    assert_matches,
    check_against_reference,
    device_for,
    fused_backends,
)

# Empty sequences at both ends and in the middle; one past a chunk, one that fills it.
LENGTHS = [0, 5, 4, 0, 9, 0]
T, N, K, V = 18, 4, 3, 5


def double(*shape):
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def naive(query, key, value, log_decay, state, scale, inclusive=True):
    """One sequence, token by token; shapes (S, heads, ...) and (N, K, V)."""
    heads = state.shape[0]
    query, key, value = (
        each.repeat_interleave(heads // each.shape[1], 1) for each in (query, key, value)
    )
    outputs = []
    for t in range(query.shape[0]):
        before = state
        if log_decay is not None:
            factor = log_decay[t].exp().reshape(heads, -1, 1)
            state = factor * state
        state = state + key[t, :, :, None] * value[t, :, None, :]
        read = state if inclusive else before
        outputs.append(scale * torch.einsum("nk,nkv->nv", query[t], read))
    empty = value.new_zeros((0, heads, value.shape[-1]))
    return (torch.stack(outputs) if outputs else empty), state


def assert_same(ours, theirs, inputs):
    weights = [torch.randn_like(each) for each in ours]
    of_ours = torch.autograd.grad(ours, inputs, weights)
    of_theirs = torch.autograd.grad(theirs, inputs, weights)
    for mine, other in zip((*ours, *of_ours), (*theirs, *of_theirs), strict=True):
        assert_matches(mine, other)


@pytest.mark.parametrize("decay", [None, "head", "channel"])
@pytest.mark.parametrize("inclusive", [True, False])
def test_packed_sequences_are_loops_over_tokens(decay, inclusive):
    inputs = [double(T, 2, K), double(T, 1, K), double(T, N, V), double(6, N, K, V)]
    log_decay = None
    if decay is not None:
        log_decay = -double(T, N, *(() if decay == "head" else (K,))).detach().abs()
        inputs.append(log_decay.requires_grad_())
    query, key, value, initial = inputs[:4]
    ours = linear_attention(
        query,
        key,
        value,
        log_decay=log_decay,
        scale=0.7,
        initial_state=initial,
        return_final_state=True,
        cu_seqlens=cu_seqlens_from_lengths(torch.tensor(LENGTHS)),
        chunk_size=4,
        inclusive=inclusive,
    )
    parts = zip(
        *(each.split(LENGTHS) for each in (query, key, value)),
        [None] * 6 if log_decay is None else log_decay.split(LENGTHS),
        initial,
        strict=True,
    )
    results = [naive(*part, 0.7, inclusive) for part in parts]
    theirs = (torch.cat([y for y, _ in results]), torch.stack([state for _, state in results]))
    assert_same(ours, theirs, inputs)


@pytest.mark.parametrize("S", [1, 7, 8])
def test_a_batch_is_one_sequence_a_row(S):
    query, key, value = double(2, S, 2, K), double(2, S, 2, K), double(2, S, 1, V)
    log_decay = (-torch.rand(2, S, 2, dtype=torch.float64)).requires_grad_()
    ours = linear_attention(
        query, key, value, log_decay=log_decay, return_final_state=True, chunk_size=4
    )
    zeros = torch.zeros(2, K, V, dtype=torch.float64)
    rows = zip(query, key, value, log_decay, strict=True)
    results = [naive(*row, zeros, K**-0.5) for row in rows]
    theirs = tuple(torch.stack(each) for each in zip(*results, strict=True))
    assert_same(ours, theirs, (query, key, value, log_decay))


def test_what_a_token_reads_can_leave_itself_out():
    query = torch.tensor([[[[1.0, 0.0]], [[0.0, 1.0]]]])
    key = torch.tensor([[[[0.5, 0.2]], [[-0.3, 0.4]]]])
    value = torch.tensor([[[[0.7, 0.1]], [[0.2, 0.6]]]])
    y, state = linear_attention(
        query, key, value, scale=1.0, return_final_state=True, inclusive=False
    )
    # Computed by hand: the second token reads 0.2 (0.7, 0.1).
    torch.testing.assert_close(y, torch.tensor([[[[0.0, 0.0]], [[0.14, 0.02]]]]))
    torch.testing.assert_close(state, torch.tensor([[[[0.29, -0.13], [0.22, 0.26]]]]))


def test_a_strong_decay_does_not_overflow():
    query, key, value = (torch.randn(1, 64, 1, 4, requires_grad=True) for _ in range(3))
    log_decay = torch.full((1, 64, 1), -300.0, requires_grad=True)
    y = linear_attention(query, key, value, log_decay=log_decay, scale=1.0)
    # Nothing is left of the past.
    torch.testing.assert_close(y, (query * key).sum(-1, keepdim=True) * value)
    gradients = torch.autograd.grad(y.sum(), (query, key, value, log_decay))
    assert all(each.isfinite().all() for each in gradients)


def test_no_token_keeps_the_state():
    query, initial = torch.randn(2, 0, 2, K), torch.randn(2, 2, K, V)
    y, state = linear_attention(
        query, query, torch.randn(2, 0, 2, V), initial_state=initial, return_final_state=True
    )
    assert y.shape == (2, 0, 2, V)
    assert torch.equal(state, initial)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": torch.randn(1, 4, 3, K)}, "`key` has 3 heads, which do not divide"),
        ({"key": torch.randn(1, 4, 4, 2)}, "`key` must have shape"),
        ({"value": torch.randn(4, 4, V)}, "`value` must have shape"),
        ({"value": torch.randn(1, 4, 4, V).double()}, "`value` must have the floating-point dtype"),
        ({"log_decay": torch.randn(1, 4, 1)}, "`log_decay` must have shape"),
        ({"initial_state": torch.randn(1, 4, V, K)}, "`initial_state` must have shape"),
        ({"chunk_size": 0}, "`chunk_size` must be at least 1, got 0"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change, message):
    arguments = {
        "query": torch.randn(1, 4, 4, K),
        "key": torch.randn(1, 4, 4, K),
        "value": torch.randn(1, 4, 4, V),
    }
    with pytest.raises(ValueError, match=message):
        linear_attention(**{**arguments, **change})


def with_gradients_of_options(function, options):
    """`function` with the named options as positional arguments after the inputs."""

    def call(query, key, value, *given, backend, **others):
        named = dict(zip(options, given, strict=True))
        return function(query, key, value, **named, **others, backend=backend)

    return call


def check(backend, dtype, decay, packed, inclusive, shape, lengths, strength=0.2):
    """Outputs, final states and gradients of every input against float64."""
    heads, N, K, V = shape
    tokens = (sum(lengths),) if packed else (len(lengths), lengths[0])
    inputs = [torch.randn(*tokens, heads, K) for _ in range(2)] + [torch.randn(*tokens, N, V)]
    names = ["initial_state"]
    inputs.append(torch.randn(len(lengths), N, K, V))
    if decay is not None:
        names.append("log_decay")
        channels = () if decay == "head" else (K,)
        inputs.append(-torch.randn(*tokens, N, *channels).abs() * strength)
    options = {"return_final_state": True, "inclusive": inclusive}
    if packed:
        options["cu_seqlens"] = cu_seqlens_from_lengths(torch.tensor(lengths))
    call = with_gradients_of_options(linear_attention, names)
    check_against_reference(call, inputs, options, backend=backend, dtype=dtype)


FUSED = [
    pytest.param(each, marks=[] if device_for(each).type == "cpu" else pytest.mark.gpu)
    for each in fused_backends(LINEAR_ATTENTION)
]


# Decays that leave nothing of the last token overflow where something is divided by them.
@pytest.mark.parametrize(
    ("decay", "inclusive", "strength"),
    [(None, False, 0.0), ("head", True, 0.2), ("head", False, 60.0), ("channel", False, 60.0)],
)
@pytest.mark.parametrize("backend", FUSED)
def test_a_kernel_matches_float64_past_a_chunk(backend, decay, inclusive, strength):
    # Channels are slow to interpret.
    N, lengths = (1, [0, 18, 3]) if decay == "channel" else (2, [0, 67, 0, 5])
    check(backend, torch.float32, decay, True, inclusive, (1, N, 20, 24), lengths, strength)


# In float32 a chunk has no parts; here it has two and four.
@pytest.mark.parametrize(("S", "strength"), [(18, 60.0), (35, 0.2)])
@pytest.mark.parametrize("backend", FUSED)
def test_parts_of_a_chunk_take_of_each_other_what_they_should(backend, S, strength):
    check(backend, torch.float16, "channel", False, True, (1, 1, 20, 24), [S], strength)


@pytest.mark.parametrize(("decay", "inclusive"), [(None, True), ("head", True), ("head", False)])
@pytest.mark.parametrize("backend", FUSED)
def test_a_sequence_walked_in_one_go_matches_float64(backend, decay, inclusive):
    with using_chunks("walk", ChunkSettings(16, 32, 16, 4, 2)):
        check(backend, torch.float16, decay, False, inclusive, (1, 2, 20, 24), [37, 37])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("lengths", [[2048, 2048], [2047, 0, 1, 65, 1983]], ids=["batch", "packed"])
@pytest.mark.parametrize("decay", [None, "head", "channel"])
def test_heads_of_models_match_float64(decay, lengths, dtype):
    packed = lengths[0] != lengths[-1]
    check("triton", dtype, decay, packed, True, (16, 16, 128, 128), lengths)


@pytest.mark.gpu
@pytest.mark.parametrize("decay", [None, "head", "channel"])
@pytest.mark.parametrize(("K", "V"), [(64, 64), (64, 128), (256, 256), (96, 200)])
def test_heads_of_other_widths_match_float64(decay, K, V):
    check("triton", torch.bfloat16, decay, False, True, (2, 8, K, V), [300, 300])


@pytest.mark.gpu
@pytest.mark.parametrize("decay", ["head", "channel"])
def test_heads_in_float32_match_float64(decay):
    check("triton", torch.float32, decay, False, False, (4, 4, 128, 128), [300])


@pytest.mark.gpu
@pytest.mark.parametrize("walk", [False, True])
def test_few_and_many_sequences_match_float64(walk):
    # Four sequences and 32 heads are walked in one go; one of 4 heads is not.
    lengths, N = ([700] * 4, 32) if walk else ([700], 4)
    check("triton", torch.bfloat16, "head", False, True, (N, N, 128, 128), lengths)
