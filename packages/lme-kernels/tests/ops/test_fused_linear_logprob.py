"""Log-probabilities of labels against torch's log-softmax of all logits in float64."""

import pytest
import torch
from torch.nn import functional as F

from lme_kernels.functional import fused_linear_logprob
from lme_kernels.ops.fused_linear_cross_entropy import chunks, linear
from lme_kernels.ops.fused_linear_logprob import FUSED_LINEAR_LOGPROB
from lme_kernels.testing import (
    assert_matches,
    check_against_reference,
    device_for,
    dtypes_for,
    fused_backends,
)

BACKENDS = ["torch", *fused_backends(FUSED_LINEAR_LOGPROB)]


@pytest.fixture(params=[None, 4], ids=["whole", "chunked"])
def chunked(request, monkeypatch):
    if request.param is not None:
        monkeypatch.setattr(chunks, "CPU_CHUNK_BYTES", 0)
        monkeypatch.setattr(chunks, "CPU_ROWS", request.param)


def dense(x, weight, labels, *, temperature=1.0):
    log_p = F.log_softmax(x @ weight.t() / temperature, dim=-1)
    kept = labels != -100
    picked = log_p[torch.arange(x.shape[0]), labels.clamp(min=0)]
    entropy = -(log_p.exp() * log_p).sum(-1)
    return picked.where(kept, 0.0), entropy.where(kept, 0.0)


def call(T=10, H=12, V=37, dtype=torch.float32, where="cpu"):
    labels = torch.randint(0, V, (T,))
    labels[1::4] = -100
    x, weight = torch.randn(T, H, dtype=dtype), torch.randn(V, H, dtype=dtype) / 2
    return [each.to(where) for each in (x, weight, labels)]


def results(function, arguments, grads, **options):
    x, weight, labels = arguments
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    outputs = function(x, weight, labels, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    grads = [grad.to(output) for grad, output in zip(grads, outputs, strict=False)]
    gradients = torch.autograd.grad(outputs[: len(grads)], (x, weight), grads)
    return [*(each.detach() for each in outputs), *gradients]


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_the_reference_is_the_dense_formula(temperature):
    arguments = call(dtype=torch.float64)
    grads = [torch.randn(10), torch.randn(10)]
    exact = results(dense, arguments, grads, temperature=temperature)
    options = {"temperature": temperature, "backend": "torch"}
    x, weight, labels = arguments
    short = (x, weight, labels.int())
    ours = results(fused_linear_logprob, short, grads, return_entropy=True, **options)
    for actual, expected in zip(ours, exact, strict=True):
        assert_matches(actual, expected)
    exact = results(dense, arguments, grads[:1], temperature=temperature)
    ours = results(fused_linear_logprob, arguments, grads[:1], **options)
    for actual, expected in zip(ours, [exact[0], *exact[2:]], strict=True):
        assert_matches(actual, expected)


# The example calls prove them in one chunk.
@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("chunked", [4], indirect=True)
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("backend", fused_backends(FUSED_LINEAR_LOGPROB))
@pytest.mark.parametrize("padded", [False, True])
def test_kernels_match_the_reference(backend, padded, entropy, monkeypatch):
    if padded:
        # As on a GPU: logits in one buffer, rows at multiples of 64.
        monkeypatch.setattr(linear, "_takes_one_buffer", lambda x: True)
    for dtype in dtypes_for(backend):
        check_against_reference(
            fused_linear_logprob,
            call(),
            {"temperature": 1.4, "return_entropy": entropy},
            backend=backend,
            dtype=dtype,
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_entropy_may_have_a_gradient(backend):
    x, weight, labels = call(where=device_for(backend))
    exact_leaf, leaf = x.double().requires_grad_(), x.detach().requires_grad_()
    (exact,) = torch.autograd.grad(dense(exact_leaf, weight.double(), labels)[1].sum(), exact_leaf)
    entropy = fused_linear_logprob(leaf, weight, labels, return_entropy=True, backend=backend)[1]
    (ours,) = torch.autograd.grad(entropy.sum(), leaf, retain_graph=True)
    assert_matches(ours, exact.float())
    assert torch.equal(torch.autograd.grad(entropy.sum(), leaf)[0], ours)


@pytest.mark.parametrize("backend", BACKENDS)
def test_classes_of_no_probability_have_no_share_in_the_entropy(backend):
    where = device_for(backend)
    x = torch.ones(3, 1, device=where)
    weight = torch.randn(19, 1, device=where)
    weight[5:] = -float("inf")
    labels = torch.tensor([0, 4, -100], device=where)
    few = dense(x.double(), weight[:5].double(), labels)
    ours = fused_linear_logprob(x, weight, labels, return_entropy=True, backend=backend)
    for actual, expected in zip(ours, few, strict=True):
        assert_matches(actual, expected.float())


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows_no_targets_and_no_grad(backend):
    x, weight, labels = call(where=device_for(backend))
    zeros = [torch.ones(0), torch.ones(0)]
    empty = (x[:0], weight, labels[:0])
    ours = results(fused_linear_logprob, empty, zeros, return_entropy=True, backend=backend)
    assert ours[0].shape == (0,)
    assert not ours[3].any()
    nothing = (x, weight, torch.full_like(labels, -100))
    for each in results(fused_linear_logprob, nothing, [torch.randn(10)], backend=backend):
        assert not each.any()
    with torch.no_grad():
        weight.requires_grad_()
        ours = fused_linear_logprob(x, weight, labels, backend=backend)
    assert_matches(ours, dense(x.double(), weight.double(), labels)[0].float())
    with pytest.raises(ValueError, match="`temperature`"):
        fused_linear_logprob(x, weight, labels, temperature=-1.0)


@pytest.mark.gpu
@pytest.mark.parametrize("V", [128256, 50257])
def test_large_vocabularies_on_a_gpu(V):
    check_against_reference(
        fused_linear_logprob,
        call(3000, 128, V),
        {"return_entropy": True, "temperature": 0.9},
        backend="triton",
        dtype=torch.bfloat16,
    )
