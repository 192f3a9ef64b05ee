import pytest
import torch

from lme_kernels.functional import m2rnn
from lme_kernels.op import UnsupportedBackendError
from lme_kernels.ops.m2rnn import M2RNN
from lme_kernels.testing import check_against_reference, fused_backends

# Empty sequences at both ends and in the middle.
LENGTHS = [0, 3, 0, 5, 1, 0]
CU = torch.tensor([0, 0, 3, 3, 8, 9, 9], dtype=torch.int32)
# Of fewer tokens, for Triton's interpreter.
SHORT = torch.tensor([0, 0, 3, 4, 4], dtype=torch.int32)
T, N, K, V = 9, 4, 3, 2
# Heads of query, key, value, weight and forget; the largest is N.
ALL, GROUPS = (4, 4, 4, 4, 4), (1, 2, 4, 2, 1)


def tensors(tokens, heads, key_size=K, value_size=V, dtype=torch.float64):
    q, k, v, w, f = heads
    result = (
        torch.randn(*tokens, q, key_size, dtype=dtype),
        torch.randn(*tokens, k, key_size, dtype=dtype),
        torch.randn(*tokens, v, value_size, dtype=dtype),
        torch.randn(w, value_size, value_size, dtype=dtype) * value_size**-0.5,
        torch.rand(*tokens, f, dtype=dtype),
    )
    return [each.requires_grad_() for each in result]


def naive(query, key, value, forget, weight, state, clip=None):
    """One sequence, token by token and head by head; shapes (S, heads, ...) and (N, K, V)."""
    heads = state.shape[0]
    outputs, last = [], []
    for n in range(heads):
        q, k, v, f = (
            each[:, n // (heads // each.shape[1])] for each in (query, key, value, forget)
        )
        matrix, h, column = weight[n // (heads // len(weight))], state[n], []
        for t in range(len(q)):
            update = torch.tanh(h @ matrix + torch.outer(k[t], v[t]))
            h = update + f[t] * (h - update)
            if clip is not None:
                h.register_hook(lambda grad: grad.clamp(-clip, clip))
            column.append((q[t][:, None] * h).sum(0))
        outputs.append(torch.stack(column) if column else value.new_zeros(0, value.shape[-1]))
        last.append(h)
    return torch.stack(outputs, 1), torch.stack(last)


def assert_same(ours, theirs, leaves):
    weights = [torch.randn_like(each) for each in theirs]
    gradients = [torch.autograd.grad(each, leaves, weights) for each in (ours, theirs)]
    for mine, other in zip((*ours, *gradients[0]), (*theirs, *gradients[1]), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("backend", ["torch", *fused_backends(M2RNN)])
def test_it_gives_the_golden_values(backend):
    query = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    key = torch.tensor([[0.5, 0.2], [-0.3, 0.4]])
    value = torch.tensor([[0.7, 0.1], [0.2, 0.6]])
    inputs = (each.view(1, 2, 1, 2) for each in (query, key, value))
    forget = torch.tensor([0.9, 0.4]).view(1, 2, 1)
    y, final = m2rnn(*inputs, torch.eye(2)[None], forget, backend=backend)
    golden = torch.tensor([[0.033638, 0.004996], [0.061744, 0.14323]])
    state = torch.tensor([[-0.002359, -0.101945], [0.061744, 0.14323]])
    # Half of the last digit that is given.
    torch.testing.assert_close(y[0, :, 0], golden, rtol=0, atol=1e-6)
    torch.testing.assert_close(final[0, 0], state, rtol=0, atol=1e-6)


@pytest.mark.parametrize("heads", [ALL, GROUPS], ids=["all heads", "groups"])
# The second bound clamps most elements of most gradients.
@pytest.mark.parametrize("clip", [None, 0.2])
@pytest.mark.parametrize("max_seqlen", [None, 5, 8])
def test_packed_sequences_are_loops_over_tokens(heads, clip, max_seqlen):
    inputs = tensors((T,), heads)
    initial = torch.randn(6, N, K, V, dtype=torch.float64, requires_grad=True)
    options = {"cu_seqlens": CU, "max_seqlen": max_seqlen, "gradient_clipping": clip}
    ours = m2rnn(*inputs, initial_state=initial, **options)
    query, key, value, weight, forget = inputs
    pieces = zip(*(each.split(LENGTHS) for each in (query, key, value, forget)), strict=True)
    results = [
        naive(*piece, weight, state, clip) for piece, state in zip(pieces, initial, strict=True)
    ]
    y, final = zip(*results, strict=True)
    assert_same(ours, (torch.cat(y), torch.stack(final)), (*inputs, initial))


@pytest.mark.parametrize("S", [1, 4])
def test_a_batch_is_a_sequence_a_row_from_zeros(S):
    inputs = tensors((2, S), GROUPS)
    query, key, value, weight, forget = inputs
    zeros = torch.zeros(N, K, V, dtype=torch.float64)
    rows = zip(query, key, value, forget, strict=True)
    results = [naive(*row, weight, zeros) for row in rows]
    assert_same(m2rnn(*inputs), [torch.stack(each) for each in zip(*results, strict=True)], inputs)


def test_gradients_are_those_of_finite_differences():
    inputs = tensors((3,), (1, 2, 1, 2, 1), 2, 2)
    initial = torch.randn(2, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    cu_seqlens = torch.tensor([0, 2, 3])
    torch.autograd.gradcheck(
        lambda *each: m2rnn(*each[:-1], initial_state=each[-1], cu_seqlens=cu_seqlens),
        (*inputs, initial),
    )


def test_the_final_state_has_the_dtype_of_the_initial_one():
    inputs = [each.detach() for each in tensors((2, 0), ALL, dtype=torch.float16)]
    initial = torch.randn(2, N, K, V, dtype=torch.float32)
    y, final = m2rnn(*inputs, initial_state=initial)
    assert y.shape == (2, 0, N, V)
    assert y.dtype == torch.float16
    assert torch.equal(final, initial)
    assert m2rnn(*inputs)[1].dtype == torch.float16


# The gradient of the initial state too, which is a keyword and so left out of the proofs of all ops.
@pytest.mark.parametrize("clip", [None, 0.2])
@pytest.mark.parametrize("backend", fused_backends(M2RNN))
def test_kernels_match_float64_on_packed_sequences(backend, clip):
    def call(*arguments, backend):
        *inputs, initial = arguments
        options = {"cu_seqlens": SHORT.to(initial.device), "gradient_clipping": clip}
        return m2rnn(*inputs, initial_state=initial, **options, backend=backend)

    arguments = [*tensors((4,), GROUPS, 5, 7), torch.randn(4, N, 5, 7)]
    check_against_reference(call, arguments, backend=backend, dtype=torch.float32)


@pytest.mark.parametrize("backend", fused_backends(M2RNN))
def test_heads_that_do_not_fit_on_chip_are_refused(backend):
    inputs = tensors((1, 1), (1,) * 5, 1025, 1025, dtype=torch.float32)
    with pytest.raises(UnsupportedBackendError, match="1025"):
        m2rnn(*inputs, backend=backend)


@pytest.mark.parametrize(
    ("position", "shape", "options", "message"),
    [
        (3, (3, V, V), {}, "do not divide the largest, 4"),
        (1, (2, 3, 4, K + 1), {}, "`key` must have shape"),
        (2, (2, 2, 4, V), {}, "`value` must have shape"),
        (3, (4, V, V + 1), {}, "`weight` must have shape"),
        (4, (2, 3, 4, 1), {}, "`forget` must have shape"),
        (0, (2, 3, 4, K), {"gradient_clipping": 0.0}, "`gradient_clipping` must be above 0"),
        (0, (2, 3, 4, K), {"initial_state": torch.ones(2, 4, V, K)}, "`initial_state` must be"),
        (0, (2, 3, 4, K), {"cu_seqlens": CU}, "must have 3 dimensions"),
    ],
)
def test_what_does_not_fit_is_refused(position, shape, options, message):
    inputs = tensors((2, 3), ALL)
    inputs[position] = torch.randn(shape, dtype=torch.float64)
    with pytest.raises(ValueError, match=message):
        m2rnn(*inputs, **options)
