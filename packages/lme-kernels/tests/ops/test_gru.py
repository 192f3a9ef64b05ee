import pytest
import torch

from lme_kernels.functional import gru
from lme_kernels.op import UnsupportedBackendError
from lme_kernels.ops.gru import GRU
from lme_kernels.testing import check_against_reference, fused_backends

# Empty sequences at both ends and in the middle.
LENGTHS = [0, 3, 0, 5, 1, 0]
CU = torch.tensor([0, 0, 3, 3, 8, 9, 9], dtype=torch.int32)
# Of fewer tokens, for Triton's interpreter.
SHORT = torch.tensor([0, 0, 3, 4, 4], dtype=torch.int32)
T, N, D = 9, 4, 3
# Heads of x, W, x_f, W_f, x_r, W_r; the largest is N.
ALL, GROUPS = (4, 4, 4, 4, 4, 4), (1, 2, 4, 1, 2, 4)


def tensors(tokens, heads, size=D, dtype=torch.float64):
    result = []
    for inputs, matrices in zip(heads[::2], heads[1::2], strict=True):
        result.append(torch.randn(*tokens, inputs, size, dtype=dtype))
        result.append(torch.randn(matrices, size, size, dtype=dtype) * size**-0.5)
    return [each.requires_grad_() for each in result]


def naive(inputs, state, clip=None):
    """One sequence, token by token and head by head: inputs (S, heads, D), state (N, D)."""
    heads = state.shape[0]

    def head(each, n):
        return each[..., n // (heads // each.shape[-2]), :]

    x, w, x_f, w_f, x_r, w_r = inputs
    outputs, last = [], []
    for n in range(heads):
        h, column = state[n], []
        matrix, forget, reset = (each[n // (heads // len(each))] for each in (w, w_f, w_r))
        for t in range(len(x)):
            f = 1 / (1 + torch.exp(-(h @ forget + head(x_f, n)[t])))
            r = 1 / (1 + torch.exp(-(h @ reset + head(x_r, n)[t])))
            z = torch.tanh((r * h) @ matrix + head(x, n)[t])
            h = z + f * (h - z)
            if clip is not None:
                h.register_hook(lambda grad: grad.clamp(-clip, clip))
            column.append(h)
        outputs.append(torch.stack(column) if column else x.new_zeros(0, D))
        last.append(h)
    return torch.stack(outputs, 1), torch.stack(last)


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
    initial = torch.randn(6, N, D, dtype=torch.float64, requires_grad=True)
    options = {"cu_seqlens": CU, "max_seqlen": max_seqlen, "gradient_clipping": clip}
    ours = gru(*inputs, initial_state=initial, **options)
    pieces = zip(*(each.split(LENGTHS) for each in inputs[::2]), initial, strict=True)
    results = []
    for x, x_f, x_r, state in pieces:
        sequence = (x, inputs[1], x_f, inputs[3], x_r, inputs[5])
        results.append(naive(sequence, state, clip))
    y, final = zip(*results, strict=True)
    assert_same(ours, (torch.cat(y), torch.stack(final)), (*inputs, initial))


@pytest.mark.parametrize("S", [1, 4])
def test_a_batch_is_a_sequence_a_row_from_zeros(S):
    inputs = tensors((2, S), GROUPS)
    ours = gru(*inputs)
    zeros = torch.zeros(N, D, dtype=torch.float64)
    rows = zip(*inputs[::2], strict=True)
    results = [naive((x, inputs[1], x_f, inputs[3], x_r, inputs[5]), zeros) for x, x_f, x_r in rows]
    assert_same(ours, [torch.stack(each) for each in zip(*results, strict=True)], inputs)


def test_gates_keep_and_reset_the_state():
    """Gates at their ends, where the result is known."""
    x, zeros = torch.tensor([[[[0.3]]]]), torch.zeros(1, 1, 1)
    weight, initial, open_ = torch.full((1, 1, 1), 0.8), torch.full((1, 1, 1), 0.5), 50.0
    for forget, reset, expected in (
        (open_, open_, 0.5),
        (-open_, open_, float(torch.tanh(torch.tensor(0.3 + 0.8 * 0.5)))),
        (-open_, -open_, float(torch.tanh(torch.tensor(0.3)))),
        (0.0, -open_, 0.5 * 0.5 + 0.5 * float(torch.tanh(torch.tensor(0.3)))),
    ):
        gates = [torch.full_like(x, each) for each in (forget, reset)]
        y, final = gru(
            x, weight, gates[0], zeros, gates[1], zeros, initial_state=initial.view(1, 1, 1)
        )
        torch.testing.assert_close(y.item(), expected, rtol=0, atol=1e-6)
        assert final.item() == y.item()


def test_gradients_are_those_of_finite_differences():
    inputs = tensors((3,), (1, 2, 2, 1, 1, 1), size=2)
    initial = torch.randn(2, 2, 2, dtype=torch.float64, requires_grad=True)
    cu_seqlens = torch.tensor([0, 2, 3])
    torch.autograd.gradcheck(
        lambda *each: gru(*each[:-1], initial_state=each[-1], cu_seqlens=cu_seqlens),
        (*inputs, initial),
    )


def test_the_final_state_has_the_dtype_of_the_initial_one():
    inputs = [each.detach() for each in tensors((2, 0), ALL, dtype=torch.float16)]
    initial = torch.randn(2, N, D, dtype=torch.float32)
    y, final = gru(*inputs, initial_state=initial)
    assert y.shape == (2, 0, N, D)
    assert y.dtype == torch.float16
    assert torch.equal(final, initial)
    assert gru(*inputs)[1].dtype == torch.float16


# The gradient of the initial state too, which is a keyword and so left out of the proofs of all ops.
@pytest.mark.parametrize("clip", [None, 0.2])
@pytest.mark.parametrize("backend", fused_backends(GRU))
def test_kernels_match_float64_on_packed_sequences(backend, clip):
    def call(*arguments, backend):
        *inputs, initial = arguments
        options = {"cu_seqlens": SHORT.to(initial.device), "gradient_clipping": clip}
        return gru(*inputs, initial_state=initial, **options, backend=backend)

    arguments = [*tensors((4,), GROUPS, size=5), torch.randn(4, N, 5)]
    check_against_reference(call, arguments, backend=backend, dtype=torch.float32)


@pytest.mark.parametrize("backend", fused_backends(GRU))
def test_heads_that_do_not_fit_on_chip_are_refused(backend):
    inputs = tensors((1, 1), (1,) * 6, size=1025, dtype=torch.float32)
    with pytest.raises(UnsupportedBackendError, match="1025"):
        gru(*inputs, backend=backend)


@pytest.mark.parametrize(
    ("position", "shape", "options", "message"),
    [
        (1, (3, D, D), {}, "do not divide the largest, 4"),
        (2, (2, 3, 4, D + 1), {}, "`forget_input` must have shape"),
        (3, (4, D, D + 1), {}, "`forget_weight` must have shape"),
        (4, (2, 2, 4, D), {}, "`reset_input` must have shape"),
        (5, (0, D, D), {}, "`reset_weight` has 0 heads"),
        (0, (2, 3, 4, D), {"gradient_clipping": -1.0}, "`gradient_clipping` must be above 0"),
        (0, (2, 3, 4, D), {"max_seqlen": -1}, "`max_seqlen` must be at least 0"),
        (0, (2, 3, 4, D), {"initial_state": torch.ones(2, 1, D)}, "`initial_state` must be"),
        (0, (2, 3, 4, D), {"cu_seqlens": CU}, "must have 3 dimensions"),
    ],
)
def test_what_does_not_fit_is_refused(position, shape, options, message):
    inputs = tensors((2, 3), ALL)
    inputs[position] = torch.randn(shape, dtype=torch.float64)
    with pytest.raises(ValueError, match=message):
        gru(*inputs, **options)
