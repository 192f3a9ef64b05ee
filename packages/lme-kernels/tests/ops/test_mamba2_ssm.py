import pytest
import torch

from lme_kernels.functional import mamba2_ssm
from lme_kernels.ops.linear_attention.settings import ChunkSettings, using_chunks
from lme_kernels.ops.mamba2_ssm import MAMBA2_SSM
from lme_kernels.packing import cu_seqlens_from_lengths
from lme_kernels.testing import (
    assert_matches,
    check_against_reference,
    device_for,
    fused_backends,
)

# Empty sequences at both ends and in the middle; one past a chunk, one that fills it.
LENGTHS = [0, 5, 4, 0, 9, 0]
T, N, P, G, n = 18, 4, 3, 2, 5


def double(*shape):
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def naive(x, dt, B, C, state, A, D):
    """One sequence, token by token; shapes (S, N, P), (S, N), (S, G, n) and (N, P, n)."""
    B, C = (each.repeat_interleave(x.shape[1] // each.shape[1], 1) for each in (B, C))
    outputs = []
    for t in range(x.shape[0]):
        written = dt[t, :, None, None] * x[t].unsqueeze(-1) * B[t].unsqueeze(-2)
        state = (dt[t] * A).exp()[:, None, None] * state + written
        outputs.append((state @ C[t].unsqueeze(-1)).squeeze(-1) + D[:, None] * x[t])
    return (torch.stack(outputs) if outputs else torch.zeros_like(x)), state


def test_packed_sequences_are_loops_over_tokens():
    x, B, C, initial = double(T, N, P), double(T, G, n), double(T, G, n), double(6, N, P, n)
    dt = torch.rand(T, N, dtype=torch.float64).requires_grad_()
    A, D = (-torch.rand(N, dtype=torch.float64) - 0.1).requires_grad_(), double(N)
    ours = mamba2_ssm(
        x,
        dt,
        A,
        B,
        C,
        D=D,
        initial_state=initial,
        return_final_state=True,
        cu_seqlens=cu_seqlens_from_lengths(torch.tensor(LENGTHS)),
        chunk_size=4,
    )
    parts = zip(*(each.split(LENGTHS) for each in (x, dt, B, C)), initial, strict=True)
    results = [naive(*part, A, D) for part in parts]
    theirs = (torch.cat([y for y, _ in results]), torch.stack([state for _, state in results]))
    inputs = (x, dt, A, B, C, D, initial)
    weights = [torch.randn_like(each) for each in ours]
    of_ours = torch.autograd.grad(ours, inputs, weights)
    of_theirs = torch.autograd.grad(theirs, inputs, weights)
    for mine, other in zip((*ours, *of_ours), (*theirs, *of_theirs), strict=True):
        assert_matches(mine, other)


def test_three_steps_by_hand():
    x = torch.tensor([[0.1, 0.2], [0.3, -0.1], [0.5, 0.4]]).view(1, 3, 1, 2)
    dt = torch.tensor([0.5, 1.0, 0.2]).view(1, 3, 1)
    B = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]]).view(1, 3, 1, 2)
    C = torch.tensor([[1.0, 1.0], [0.0, 1.0], [1.0, 0.0]]).view(1, 3, 1, 2)
    y, state = mamba2_ssm(
        x, dt, torch.tensor([-1.0]), B, C, D=torch.tensor([0.5]), return_final_state=True
    )
    expected = torch.tensor([[0.1, 0.2], [0.3, -0.1], [0.387869, 0.189183]])
    torch.testing.assert_close(y.view(3, 2), expected, atol=1e-6, rtol=1e-5)
    expected = torch.tensor([[0.137869, 0.22281], [-0.010817, 0.039063]])
    torch.testing.assert_close(state.view(2, 2), expected, atol=1e-6, rtol=1e-4)


def test_no_token_keeps_the_state():
    initial = torch.randn(2, N, P, n)
    y, state = mamba2_ssm(
        torch.randn(2, 0, N, P),
        torch.rand(2, 0, N),
        -torch.rand(N),
        torch.randn(2, 0, G, n),
        torch.randn(2, 0, G, n),
        initial_state=initial,
        return_final_state=True,
    )
    assert y.shape == (2, 0, N, P)
    assert torch.equal(state, initial)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"B": torch.randn(1, 4, 3, n), "C": torch.randn(1, 4, 3, n)}, "do not divide"),
        ({"C": torch.randn(1, 4, 1, n)}, "`C` must have shape"),
        ({"A": torch.randn(1)}, r"`A` must have shape \(4,\), got \(1,\)"),
        ({"dt": torch.randn(1, 4, 1)}, "`dt` must have shape"),
        ({"initial_state": torch.randn(1, N, n, P)}, "`initial_state` must have shape"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change, message):
    arguments = {
        "x": torch.randn(1, 4, N, P),
        "dt": torch.rand(1, 4, N),
        "A": -torch.rand(N),
        "B": torch.randn(1, 4, G, n),
        "C": torch.randn(1, 4, G, n),
    }
    with pytest.raises(ValueError, match=message):
        mamba2_ssm(**{**arguments, **change})


def check(backend, dtype, packed, sizes, lengths):
    """Outputs, final states and gradients of every input against float64."""
    heads, width, groups, channels = sizes
    tokens = (sum(lengths),) if packed else (len(lengths), lengths[0])
    inputs = (
        torch.randn(*tokens, heads, width),
        torch.rand(*tokens, heads) * 0.2,
        -torch.rand(heads) - 0.5,
        torch.randn(*tokens, groups, channels),
        torch.randn(*tokens, groups, channels),
        torch.randn(heads),
        torch.randn(len(lengths), heads, width, channels),
    )
    options = {"return_final_state": True}
    if packed:
        options["cu_seqlens"] = cu_seqlens_from_lengths(torch.tensor(lengths))

    def call(x, dt, A, B, C, D, initial_state, **others):
        return mamba2_ssm(x, dt, A, B, C, D=D, initial_state=initial_state, **others)

    check_against_reference(call, inputs, options, backend=backend, dtype=dtype)


FUSED = [
    pytest.param(each, marks=[] if device_for(each).type == "cpu" else pytest.mark.gpu)
    for each in fused_backends(MAMBA2_SSM)
]


@pytest.mark.parametrize("backend", FUSED)
def test_a_kernel_matches_float64_past_a_chunk(backend):
    check(backend, torch.float16, True, (4, 24, 2, 20), [0, 67, 0, 5])


@pytest.mark.parametrize("backend", FUSED)
def test_a_sequence_walked_in_one_go_matches_float64(backend):
    with using_chunks("walk", ChunkSettings(16, 32, 16, 4, 2)):
        check(backend, torch.float16, False, (2, 24, 1, 20), [37, 37])


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [[2048, 2048], [2047, 0, 1, 65, 1983]], ids=["batch", "packed"])
@pytest.mark.parametrize("groups", [1, 8])
def test_heads_of_models_match_float64(groups, lengths):
    packed = lengths[0] != lengths[-1]
    check("triton", torch.bfloat16, packed, (32, 64, groups, 128), lengths)


# Widths that fill no block, as of a 400 M model, where sequences and heads suffice for a walk.
@pytest.mark.gpu
@pytest.mark.parametrize(("N", "width", "S"), [(64, 19, 512), (32, 64, 2048)])
def test_wide_states_of_many_heads_match_float64(N, width, S):
    check("triton", torch.bfloat16, False, (N, width, 1, 216), [S, S])


@pytest.mark.gpu
@pytest.mark.parametrize("width", [64, 128])
def test_walks_of_many_chunks_give_the_same_bits_each_time(width):
    # Enough sequences and heads that each is walked by one program; what a program loads ahead must
    # not reach the shared memory that tensor cores still read.
    heads, tokens = 32, (4, 2048)
    x = torch.randn(*tokens, heads, width, device="cuda", dtype=torch.bfloat16)
    B, C = (torch.randn(*tokens, 1, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    dt, A = torch.rand(*tokens, heads, device="cuda") * 0.2, -torch.rand(heads, device="cuda")
    D = torch.randn(heads, device="cuda")
    first = mamba2_ssm(x, dt, A, B, C, D=D, backend="triton")
    for _ in range(50):
        again = mamba2_ssm(x, dt, A, B, C, D=D, backend="triton")
        assert torch.equal(first, again)
