import pytest
import torch

from lme_kernels.functional import lstm
from lme_kernels.op import UnsupportedBackendError
from lme_kernels.ops.lstm import LSTM
from lme_kernels.testing import check_against_reference, fused_backends

# Empty sequences at both ends and in the middle.
LENGTHS = [0, 3, 0, 5, 1, 0]
CU = torch.tensor([0, 0, 3, 3, 8, 9, 9], dtype=torch.int32)
# Of fewer tokens, for Triton's interpreter.
SHORT = torch.tensor([0, 0, 3, 4, 4], dtype=torch.int32)
T, N, D = 9, 4, 3
# Heads of x, W, and of inputs and matrices of the gates f, i and o; the largest is N.
ALL, GROUPS = (4,) * 8, (1, 2, 4, 1, 2, 4, 1, 2)


def tensors(tokens, heads, size=D, dtype=torch.float64):
    result = []
    for inputs, matrices in zip(heads[::2], heads[1::2], strict=True):
        result.append(torch.randn(*tokens, inputs, size, dtype=dtype))
        result.append(torch.randn(matrices, size, size, dtype=dtype) * size**-0.5)
    return [each.requires_grad_() for each in result]


def naive(inputs, matrices, state, cell, clip=None):
    """One sequence, token by token and head by head: inputs (S, heads, D), states (N, D)."""
    heads = state.shape[0]
    outputs, last_state, last_cell = [], [], []
    for n in range(heads):
        h, c, column = state[n], cell[n], []
        own = [each[:, n // (heads // each.shape[1])] for each in inputs]
        x, x_f, x_i, x_o = own
        w, w_f, w_i, w_o = (each[n // (heads // len(each))] for each in matrices)
        for t in range(len(x)):
            g = torch.tanh(h @ w + x[t])
            f, i, o = (
                1 / (1 + torch.exp(-(h @ matrix + each[t])))
                for each, matrix in ((x_f, w_f), (x_i, w_i), (x_o, w_o))
            )
            c = f * c + i * g
            h = o * torch.tanh(c)
            if clip is not None:
                for each in (c, h):
                    each.register_hook(lambda grad: grad.clamp(-clip, clip))
            column.append(h)
        outputs.append(torch.stack(column) if column else x.new_zeros(0, D))
        last_state.append(h)
        last_cell.append(c)
    return torch.stack(outputs, 1), torch.stack(last_state), torch.stack(last_cell)


def assert_same(ours, theirs, leaves):
    weights = [torch.randn_like(each) for each in theirs]
    gradients = [torch.autograd.grad(each, leaves, weights) for each in (ours, theirs)]
    for mine, other in zip((*ours, *gradients[0]), (*theirs, *gradients[1]), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("heads", [ALL, GROUPS], ids=["all heads", "groups"])
# The second bound clamps most elements of most gradients.
@pytest.mark.parametrize("clip", [None, 0.2])
@pytest.mark.parametrize("max_seqlen", [None, 5, 8])
def test_packed_sequences_are_loops_over_tokens(heads, clip, max_seqlen):
    inputs = tensors((T,), heads)
    states = [torch.randn(6, N, D, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    ours = lstm(
        *inputs,
        initial_state=states[0],
        initial_cell=states[1],
        cu_seqlens=CU,
        max_seqlen=max_seqlen,
        gradient_clipping=clip,
    )
    pieces = zip(*(each.split(LENGTHS) for each in inputs[::2]), *states, strict=True)
    results = [naive(piece[:4], inputs[1::2], *piece[4:], clip) for piece in pieces]
    y, state, cell = zip(*results, strict=True)
    theirs = torch.cat(y), torch.stack(state), torch.stack(cell)
    assert_same(ours, theirs, (*inputs, *states))


def test_one_head_is_the_lstm_of_torch():
    inputs = tensors((2, 5), (1,) * 8)
    states = [torch.randn(2, 1, D, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    ours = lstm(*inputs, initial_state=states[0], initial_cell=states[1])
    # torch has the gates in the order i, f, g, o and column vectors, and projects its input.
    order = (2, 1, 0, 3)
    layer = torch.nn.LSTM(4 * D, D, bias=False, batch_first=True, dtype=torch.float64)
    weights = {
        "weight_ih_l0": torch.eye(4 * D, dtype=torch.float64),
        "weight_hh_l0": torch.cat([inputs[1::2][each][0].T for each in order]),
    }
    x = torch.cat([inputs[::2][each][:, :, 0] for each in order], -1)
    y, (state, cell) = torch.func.functional_call(
        layer, weights, (x, tuple(each.transpose(0, 1) for each in states))
    )
    theirs = y.unsqueeze(2), state.transpose(0, 1), cell.transpose(0, 1)
    assert_same(ours, theirs, (*inputs, *states))


@pytest.mark.parametrize("S", [1, 4])
def test_a_batch_is_a_sequence_a_row_from_zeros(S):
    inputs = tensors((2, S), GROUPS)
    zeros = torch.zeros(N, D, dtype=torch.float64)
    results = [naive(row, inputs[1::2], zeros, zeros) for row in zip(*inputs[::2], strict=True)]
    theirs = [torch.stack(each) for each in zip(*results, strict=True)]
    assert_same(lstm(*inputs), theirs, inputs)


def test_gradients_are_those_of_finite_differences():
    inputs = tensors((3,), (1, 2, 2, 1, 1, 1, 1, 1), size=2)
    states = [torch.randn(2, 2, 2, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    cu_seqlens = torch.tensor([0, 2, 3])

    def call(*each):
        state, cell = each[-2:]
        return lstm(*each[:-2], initial_state=state, initial_cell=cell, cu_seqlens=cu_seqlens)

    torch.autograd.gradcheck(call, (*inputs, *states))


def test_final_states_have_the_dtypes_of_the_initial_ones():
    inputs = [each.detach() for each in tensors((2, 0), ALL, dtype=torch.float16)]
    initial = torch.randn(2, N, D, dtype=torch.float32)
    y, state, cell = lstm(*inputs, initial_cell=initial)
    assert y.shape == (2, 0, N, D)
    assert (y.dtype, state.dtype) == (torch.float16, torch.float16)
    assert torch.equal(cell, initial)
    assert not state.any()


# The gradients of the initial states too, which are keywords and so left out of the other proofs.
@pytest.mark.parametrize("clip", [None, 0.2])
@pytest.mark.parametrize("backend", fused_backends(LSTM))
def test_kernels_match_float64_on_packed_sequences(backend, clip):
    def call(*arguments, backend):
        *inputs, state, cell = arguments
        options = {"cu_seqlens": SHORT.to(state.device), "gradient_clipping": clip}
        return lstm(*inputs, initial_state=state, initial_cell=cell, **options, backend=backend)

    arguments = [*tensors((4,), GROUPS, size=5), torch.randn(4, N, 5), torch.randn(4, N, 5)]
    check_against_reference(call, arguments, backend=backend, dtype=torch.float32)


@pytest.mark.parametrize("backend", fused_backends(LSTM))
def test_heads_that_do_not_fit_on_chip_are_refused(backend):
    inputs = tensors((1, 1), (1,) * 8, size=1025, dtype=torch.float32)
    with pytest.raises(UnsupportedBackendError, match="1025"):
        lstm(*inputs, backend=backend)


@pytest.mark.parametrize(
    ("position", "shape", "options", "message"),
    [
        (1, (3, D, D), {}, "do not divide the largest, 4"),
        (2, (2, 3, 4, D + 1), {}, "`forget_input` must have shape"),
        (5, (4, D, D + 1), {}, "`input_weight` must have shape"),
        (6, (2, 2, 4, D), {}, "`output_input` must have shape"),
        (0, (2, 3, 4, D), {"gradient_clipping": 0.0}, "`gradient_clipping` must be above 0"),
        (0, (2, 3, 4, D), {"initial_state": torch.ones(2, 1, D)}, "`initial_state` must be"),
        (0, (2, 3, 4, D), {"initial_cell": torch.ones(1, 4, D)}, "`initial_cell` must be"),
        (0, (2, 3, 4, D), {"cu_seqlens": CU}, "must have 3 dimensions"),
    ],
)
def test_what_does_not_fit_is_refused(position, shape, options, message):
    inputs = tensors((2, 3), ALL)
    inputs[position] = torch.randn(shape, dtype=torch.float64)
    with pytest.raises(ValueError, match=message):
        lstm(*inputs, **options)
