"""Norms and clipping against float64, and what happens to gradients that are not finite."""

import pytest
import torch

from lme_kernels.optim import clip_grad_norm_, grad_norm

WHERE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = [
    pytest.param("torch", "cpu"),
    pytest.param("triton", WHERE, marks=[pytest.mark.gpu] if WHERE == "cuda" else []),
]
SHAPES = ((65536 + 4099,), (3, 5), (0,), (1,), (4096,))


def grads(where, dtypes=(torch.float32,)):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(shape, generator=generator).to(where, dtypes[index % len(dtypes)])
        for index, shape in enumerate(SHAPES)
    ]


def exact_norm(tensors):
    return sum(each.cpu().double().square().sum() for each in tensors).sqrt()


def with_grads(tensors):
    parameters = [torch.nn.Parameter(torch.zeros_like(each)) for each in tensors]
    for parameter, grad in zip(parameters, tensors, strict=True):
        parameter.grad = grad
    return [*parameters, torch.nn.Parameter(torch.ones(2))]


@pytest.mark.parametrize(("backend", "where"), BACKENDS)
@pytest.mark.parametrize("dtypes", [(torch.float32,), (torch.float32, torch.float16)], ids=str)
def test_the_norm_matches_float64_and_gives_the_same_bits(backend, where, dtypes):
    tensors = grads(where, dtypes)
    norm = grad_norm(tensors, backend=backend)
    assert norm.ndim == 0
    assert norm.dtype == torch.float32
    # Sums of some thousand squares a lane: half an epsilon each, at random.
    assert float(norm) == pytest.approx(float(exact_norm(tensors)), rel=1e-6)
    assert torch.equal(norm, grad_norm(tensors, backend=backend))


def test_the_norm_of_float64_is_float64():
    tensors = [each.double() for each in grads("cpu")]
    assert float(grad_norm(tensors)) == pytest.approx(float(exact_norm(tensors)), rel=1e-14)


def test_there_may_be_no_gradients():
    assert float(grad_norm([])) == 0.0
    assert float(clip_grad_norm_([torch.nn.Parameter(torch.ones(2))], 1.0)) == 0.0
    only_empty = grad_norm([torch.zeros(0)], backend="triton" if WHERE == "cpu" else "torch")
    assert float(only_empty) == 0.0


@pytest.mark.parametrize(("backend", "where"), BACKENDS)
@pytest.mark.parametrize("dtypes", [(torch.float32,), (torch.float32, torch.float16)], ids=str)
def test_clipping_scales_to_the_bound(backend, where, dtypes):
    tensors = grads(where, dtypes)
    before = [each.clone() for each in tensors]
    norm = clip_grad_norm_(with_grads(tensors), 0.5, backend=backend)
    assert float(norm) == pytest.approx(float(exact_norm(before)), rel=1e-6)
    for each, whole in zip(tensors, before, strict=True):
        expected = whole.double() * (0.5 / float(norm))
        rtol = 1e-6 if each.dtype == torch.float32 else 1e-3
        torch.testing.assert_close(each.double(), expected, rtol=rtol, atol=1e-6)


@pytest.mark.parametrize(("backend", "where"), BACKENDS)
def test_gradients_within_the_bound_keep_their_bits(backend, where):
    tensors = grads(where)
    before = [each.clone() for each in tensors]
    clip_grad_norm_(with_grads(tensors), 1e6, backend=backend)
    for each, whole in zip(tensors, before, strict=True):
        assert torch.equal(each, whole)


@pytest.mark.parametrize(("backend", "where"), BACKENDS)
@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")], ids=str)
def test_a_norm_that_is_not_finite_is_returned_and_nothing_scaled(backend, where, value):
    tensors = grads(where)
    tensors[0][70] = value
    before = [each.clone() for each in tensors]
    norm = clip_grad_norm_(with_grads(tensors), 0.5, backend=backend)
    assert not bool(norm.isfinite())
    assert bool(norm.isnan()) == (value != value)
    for each, whole in zip(tensors, before, strict=True):
        torch.testing.assert_close(each, whole, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("backend", "where"), BACKENDS)
def test_gradients_with_strides_are_counted_and_scaled(backend, where):
    whole = torch.randn(6, 8, generator=torch.Generator().manual_seed(0)).to(where)
    parameter = torch.nn.Parameter(torch.zeros(8, 6, device=where))
    parameter.grad = whole.t()
    expected = whole.cpu().double() / float(exact_norm([whole]))
    clip_grad_norm_(parameter, 1.0, backend=backend)
    torch.testing.assert_close(parameter.grad.cpu().double(), expected.t(), rtol=2e-6, atol=1e-7)


def test_misuse_is_refused():
    with pytest.raises(ValueError, match="`max_norm` must be above 0"):
        clip_grad_norm_([], 0.0)


@pytest.mark.gpu
def test_clipping_neither_waits_nor_misses_a_replay():
    source = grads("cuda")
    with_source = with_grads([each.clone() for each in source])[:-1]
    clip_grad_norm_(with_source, 0.5, backend="triton")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        clip_grad_norm_(with_source, 0.5, backend="triton")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for each, grad in zip(with_source, source, strict=True):
            each.grad = grad * 2.0
        norm = clip_grad_norm_(with_source, 0.5, backend="triton")
    norm.zero_()
    graph.replay()
    assert float(norm) == pytest.approx(2 * float(exact_norm(source)), rel=1e-6)
    assert float(exact_norm([each.grad for each in with_source])) == pytest.approx(0.5, rel=1e-5)
