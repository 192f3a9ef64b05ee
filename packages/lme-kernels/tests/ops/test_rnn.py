import pytest
import torch

from lme_kernels.functional import rnn
from lme_kernels.op import UnsupportedBackendError
from lme_kernels.ops.rnn import RNN
from lme_kernels.ops.rnn.settings import ScanSettings, scan_candidates, using_scan
from lme_kernels.testing import check_against_reference, fused_backends

CU = torch.tensor([0, 0, 3, 3, 8, 9, 9], dtype=torch.int32)


def double(*shape, scale=1.0):
    return (torch.randn(shape, dtype=torch.float64) * scale).requires_grad_()


def naive(x, weight, initial, activation):
    """One sequence (S, N, D), head by head, row vector times matrix."""
    state, outputs = list(initial), []
    for x_t in x:
        state = [
            activation((h[:, None] * w).sum(0) + x_n)
            for h, w, x_n in zip(state, weight, x_t, strict=True)
        ]
        outputs.append(torch.stack(state))
    return torch.stack(outputs) if outputs else x, torch.stack(state)


def test_it_gives_the_golden_values():
    x = torch.tensor([[0.1, 0.2], [0.3, -0.1], [0.0, 0.5]], dtype=torch.float64)
    weight = torch.tensor([[[0.5, -0.2], [0.1, 0.3]]], dtype=torch.float64)
    y, final = rnn(x.view(1, 3, 1, 2), weight)
    golden = [[0.099668, 0.197375], [0.353617, -0.060646], [0.169104, 0.389392]]
    torch.testing.assert_close(y[0, :, 0], torch.tensor(golden).double(), rtol=0, atol=6e-7)
    assert torch.equal(final[0], y[0, -1])


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
@pytest.mark.parametrize("max_seqlen", [None, 5, 7])
def test_packed_sequences_are_walked_apart(nonlinearity, max_seqlen):
    x, weight, initial = double(9, 2, 3), double(4, 3, 3, scale=0.5), double(6, 4, 3)
    options = {"cu_seqlens": CU, "max_seqlen": max_seqlen, "nonlinearity": nonlinearity}
    ours = rnn(x, weight, initial_state=initial, **options)
    spread, activation = x.repeat_interleave(2, 1), vars(torch)[nonlinearity]
    pieces = [
        naive(spread[start:end], weight, initial[i], activation)
        for i, (start, end) in enumerate(zip(CU[:-1].tolist(), CU[1:].tolist(), strict=True))
    ]
    theirs = torch.cat([y for y, _ in pieces]), torch.stack([final for _, final in pieces])
    weights = [torch.randn_like(each) for each in theirs]
    gradients = [
        torch.autograd.grad(each, (x, weight, initial), weights) for each in (ours, theirs)
    ]
    for mine, other in zip((*ours, *gradients[0]), (*theirs, *gradients[1]), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


def test_a_batch_is_its_sequences_packed():
    x, weight = double(3, 4, 2, 3), double(2, 3, 3, scale=0.5)
    packed = rnn(x.flatten(0, 1), weight, cu_seqlens=torch.arange(4) * 4)
    for mine, other in zip(rnn(x, weight), packed, strict=True):
        torch.testing.assert_close(mine.flatten(), other.flatten(), rtol=1e-12, atol=1e-12)


def test_gradients_are_those_of_finite_differences():
    x, weight, initial = double(2, 3, 1, 2), double(2, 2, 2), double(2, 2, 2)
    torch.autograd.gradcheck(lambda a, b, c: rnn(a, b, initial_state=c), (x, weight, initial))


def test_the_gradient_of_each_state_is_clamped():
    x, weight, bound = double(1, 3, 1, 2), double(1, 2, 2), 0.1
    initial = double(1, 1, 2)
    y, _ = rnn(x, weight, initial_state=initial, gradient_clipping=bound)
    grad_y = torch.randn_like(y)
    grads = torch.autograd.grad(y, (x, initial), grad_y)
    carried, expected = torch.zeros(2, dtype=torch.float64), []
    for t in (2, 1, 0):
        delta = (grad_y[0, t, 0] + carried).clamp(-bound, bound) * (1 - y[0, t, 0] ** 2)
        carried = weight[0] @ delta
        expected.insert(0, delta)
    torch.testing.assert_close(grads[0][0, :, 0], torch.stack(expected), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grads[1][0, 0], carried, rtol=1e-12, atol=1e-12)


# The gradient of the initial state, which is a keyword and so left out elsewhere.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("clip", [None, 0.3])
@pytest.mark.parametrize("backend", fused_backends(RNN))
def test_gradients_flow_through_both_states(backend, clip, dtype):
    def call(x, weight, initial, backend):
        options = {"cu_seqlens": CU.to(x.device), "gradient_clipping": clip, "backend": backend}
        return rnn(x, weight, initial_state=initial, **options)

    arguments = torch.randn(9, 1, 5), torch.randn(2, 5, 5) * 0.3, torch.randn(6, 2, 5)
    check_against_reference(call, arguments, backend=backend, dtype=dtype)


@pytest.mark.parametrize("backend", fused_backends(RNN))
@pytest.mark.parametrize("settings", [ScanSettings(8, 4, 1), ScanSettings(16, 4, 4)], ids=str)
def test_tensor_cores_give_the_same(settings, backend):
    arguments = torch.randn(3, 3, 1, 16), torch.randn(1, 16, 16) * 0.2
    with using_scan("rnn.forward", settings):
        check_against_reference(rnn, arguments, backend=backend, dtype=torch.float16)
    with using_scan("rnn.backward", settings):
        check_against_reference(rnn, arguments, backend=backend, dtype=torch.float16)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(8, 300, 16, 64), (3, 129, 2, 127), (40, 65, 20, 64)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_sizes_of_models_match_float64(shape, dtype):
    D = shape[-1]
    arguments = torch.randn(shape), torch.randn(shape[2], D, D) * 0.5 * D**-0.5
    check_against_reference(rnn, arguments, backend="triton", dtype=dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("settings", scan_candidates(1, 64, torch.bfloat16), ids=str)
def test_every_candidate_gives_the_same(settings):
    arguments = torch.randn(5, 70, 2, 64), torch.randn(2, 64, 64) * 0.06
    with using_scan("rnn.forward", settings):
        check_against_reference(rnn, arguments, backend="triton", dtype=torch.bfloat16)
    with using_scan("rnn.backward", settings):
        check_against_reference(rnn, arguments, backend="triton", dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("shapes", "options", "message"),
    [
        (((2, 3, 2, 4), (3, 4, 4)), {}, "do not divide the largest, 3"),
        (((2, 3, 2, 4), (2, 4, 3)), {}, "`weight` must have shape"),
        (((6, 2, 4), (2, 4, 4)), {}, "must have 4 dimensions"),
        (((2, 3, 2, 4), (2, 4, 4)), {"nonlinearity": "gelu"}, "`nonlinearity` must be"),
        (((2, 3, 2, 4), (2, 4, 4)), {"gradient_clipping": 0.0}, "`gradient_clipping` must be"),
        (((2, 3, 2, 4), (2, 4, 4)), {"initial_state": torch.ones(2, 1, 4)}, "`initial_state`"),
        (((6, 2, 4), (2, 4, 4)), {"cu_seqlens": torch.ones(2)}, "`cu_seqlens` must have"),
    ],
)
def test_what_does_not_fit_is_refused(shapes, options, message):
    with pytest.raises(ValueError, match=message):
        rnn(*(torch.randn(shape) for shape in shapes), **options)


@pytest.mark.parametrize("backend", fused_backends(RNN))
def test_heads_that_do_not_fit_on_chip_are_refused(backend):
    x, weight = torch.randn(1, 1, 1, 257), torch.randn(1, 257, 257)
    with pytest.raises(UnsupportedBackendError, match="heads have 257 channels"):
        rnn(x, weight, backend=backend)
