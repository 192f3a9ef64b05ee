"""Cross-entropy against a dense formula in float64, option by option."""

import pytest
import torch
from torch.nn import functional as F

from lme_kernels.functional import cross_entropy
from lme_kernels.op import Backend
from lme_kernels.ops.cross_entropy import CROSS_ENTROPY
from lme_kernels.testing import (
    assert_matches,
    check_against_reference,
    device_for,
    dtypes_for,
    fused_backends,
)

BACKENDS = [Backend.TORCH, *fused_backends(CROSS_ENTROPY)]
OPTIONS = [
    {},
    {"label_smoothing": 0.1},
    {"z_loss": 0.02},
    {"softcap": 5.0},
    {"logit_scale": 0.3},
    {"label_smoothing": 0.2, "z_loss": 0.01, "softcap": 4.0, "logit_scale": 1.7, "ignore_index": 3},
]


def dense(
    logits,
    labels,
    *,
    label_smoothing=0.0,
    z_loss=0.0,
    softcap=None,
    logit_scale=1.0,
    ignore_index=-100,
    reduction="mean",
):
    """The docstring's formula with a full target distribution, in float64."""
    z = logits.double() * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    V = z.shape[-1]
    kept = labels != ignore_index
    target = torch.full_like(z, label_smoothing / V)
    one_hot = F.one_hot(labels.where(kept, 0), V).double()
    target = target + (1 - label_smoothing) * one_hot
    exponentials = (z - z.max()).exp()
    log_z = exponentials.sum(-1).log() + z.max()
    rows = ((log_z.unsqueeze(-1) - z) * target).sum(-1) + z_loss * log_z**2
    rows = rows * kept
    if reduction == "none":
        return rows
    return rows.sum() if reduction == "sum" else rows.sum() / kept.sum()


def call(T, V, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(T, V, generator=generator) * 3
    labels = torch.randint(0, V, (T,), generator=generator)
    labels[1::4] = -100
    return logits, labels


def value_and_gradient(function, logits, labels, weights=None, **options):
    logits = logits.detach().requires_grad_()
    loss = function(logits, labels, **options)
    weights = torch.ones_like(loss) if weights is None else weights.to(loss.dtype)
    return loss.detach(), torch.autograd.grad(loss, logits, weights)[0]


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda each: "+".join(each) or "plain")
def test_the_reference_is_the_dense_formula(options, reduction):
    logits, labels = call(6, 11)
    if "ignore_index" in options:
        labels = labels.where(labels >= 0, options["ignore_index"])
    weights = torch.randn(6) if reduction == "none" else torch.tensor(1.7)
    exact = value_and_gradient(
        dense, logits.double(), labels, weights, reduction=reduction, **options
    )
    ours = value_and_gradient(
        cross_entropy,
        logits.double(),
        labels,
        weights,
        reduction=reduction,
        backend="torch",
        **options,
    )
    for actual, expected in zip(ours, exact, strict=True):
        assert_matches(actual, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_agrees_with_torch(backend):
    logits, labels = (each.to(device_for(backend)) for each in call(9, 130))
    options = {"label_smoothing": 0.1}
    theirs = value_and_gradient(F.cross_entropy, logits, labels, **options)
    for same in (labels, labels.int()):
        ours = value_and_gradient(cross_entropy, logits, same, backend=backend, **options)
        for actual, expected in zip(ours, theirs, strict=True):
            assert_matches(actual, expected)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda each: "+".join(each) or "plain")
@pytest.mark.parametrize("backend", fused_backends(CROSS_ENTROPY))
# One row; an odd number of classes past two blocks; classes that are no multiple of 16.
@pytest.mark.parametrize("shape", [(1, 37), (3, 8229)], ids=str)
def test_kernels_match_the_reference(shape, backend, options):
    logits, labels = call(*shape)
    if "ignore_index" in options:
        labels = labels.where(labels >= 0, options["ignore_index"])
    for dtype in dtypes_for(backend):
        check_against_reference(
            cross_entropy,
            (logits, labels),
            {**options, "reduction": "none"},
            backend=backend,
            dtype=dtype,
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_targets_the_mean_is_nan_and_its_gradient_zero_as_in_torch(backend):
    where = device_for(backend)
    logits = torch.randn(3, 7, device=where)
    labels = torch.full((3,), -100, device=where)
    loss, gradient = value_and_gradient(cross_entropy, logits, labels, backend=backend)
    theirs, _ = value_and_gradient(F.cross_entropy, logits, labels)
    assert torch.isnan(loss)
    assert torch.isnan(theirs)
    assert torch.equal(gradient, torch.zeros_like(gradient))
    loss, gradient = value_and_gradient(
        cross_entropy, logits[:0], labels[:0], reduction="sum", backend=backend
    )
    assert loss == 0
    assert gradient.shape == (0, 7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_are_ignored_may_hold_anything(backend):
    where = device_for(backend)
    logits, labels = call(5, 19)
    logits[1] = float("nan")
    loss, gradient = value_and_gradient(
        cross_entropy, logits.to(where), labels.to(where), reduction="none", backend=backend
    )
    kept = labels != -100
    expected = dense(logits[kept], labels[kept], reduction="none").float()
    assert_matches(loss.cpu()[kept], expected)
    assert loss[1] == 0
    if backend != Backend.TORCH:
        assert torch.equal(gradient[1], torch.zeros_like(gradient[1]))


@pytest.mark.parametrize("backend", fused_backends(CROSS_ENTROPY))
def test_a_label_that_is_no_class_makes_its_loss_nan(backend):
    where = device_for(backend)
    logits, labels = torch.randn(3, 8, device=where), torch.tensor([1, 8, -1], device=where)
    losses = cross_entropy(logits, labels, reduction="none", backend=backend)
    assert torch.isnan(losses).tolist() == [False, True, True]


@pytest.mark.parametrize("backend", BACKENDS)
def test_classes_of_no_probability_are_allowed(backend):
    where = device_for(backend)
    logits = torch.randn(4, 21)
    logits[:, ::2] = -float("inf")
    labels = torch.tensor([1, 3, 5, -100])
    loss, gradient = value_and_gradient(
        cross_entropy, logits.to(where), labels.to(where), backend=backend
    )
    few = value_and_gradient(dense, logits[:, 1::2].double(), labels.where(labels < 0, labels // 2))
    assert_matches(loss.cpu(), few[0].float())
    assert_matches(gradient.cpu()[:, 1::2], few[1].float())
    assert torch.equal(gradient[:, ::2], torch.zeros_like(gradient[:, ::2]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_and_labels_may_have_strides(backend):
    where = device_for(backend)
    wide = torch.randn(2, 3, 40, device=where)
    for logits in (wide[..., 3:36], wide.transpose(0, 1), wide[..., ::2]):
        V = logits.shape[-1]
        labels = torch.randint(0, V, logits.shape[:-1][::-1], device=where).t()
        ours = value_and_gradient(cross_entropy, logits, labels, backend=backend)
        exact = value_and_gradient(dense, logits.double(), labels)
        for actual, expected in zip(ours, exact, strict=True):
            assert_matches(actual, expected.float())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduction": "average"}, "`reduction`"),
        ({"label_smoothing": 1.5}, "`label_smoothing`"),
        ({"z_loss": -1.0}, "`z_loss`"),
        ({"softcap": 0.0}, "`softcap`"),
    ],
)
def test_options_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        cross_entropy(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64), **options)
    with pytest.raises(ValueError, match=r"`labels` must have shape \(2,\)"):
        cross_entropy(torch.zeros(2, 3), torch.zeros(3, dtype=torch.int64))


@pytest.mark.gpu
@pytest.mark.parametrize("options", OPTIONS[:-1], ids=lambda each: "+".join(each) or "plain")
# A vocabulary of Llama 3, and an odd one.
@pytest.mark.parametrize("V", [128256, 50257])
def test_large_vocabularies_on_a_gpu(V, options):
    logits, labels = call(300, V)
    for dtype in (torch.bfloat16, torch.float32):
        check_against_reference(
            cross_entropy, (logits, labels), options, backend="triton", dtype=dtype
        )


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements():
    T, V = 17000, 128256
    logits = torch.randn(T, V, device="cuda", dtype=torch.bfloat16)
    labels = torch.randint(0, V, (T,), device="cuda")
    ours = value_and_gradient(cross_entropy, logits, labels, reduction="sum", backend="triton")
    last = value_and_gradient(
        cross_entropy, logits[-64:], labels[-64:], reduction="sum", backend="torch"
    )
    assert_matches(ours[1][-64:], last[1])
    assert torch.isfinite(ours[0])


@pytest.mark.gpu
def test_a_cuda_graph_replays_with_new_contents():
    logits = torch.randn(64, 1000, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(0, 1000, (64,), device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.autograd.grad(cross_entropy(logits, labels, backend="triton"), logits)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = cross_entropy(logits, labels, backend="triton")
        gradient = torch.autograd.grad(loss, logits)[0]
    with torch.no_grad():
        logits.copy_(torch.randn_like(logits))
    labels.copy_(torch.randint_like(labels, 1000))
    graph.replay()
    expected = value_and_gradient(cross_entropy, logits, labels, backend="triton")
    assert torch.equal(loss, expected[0])
    assert torch.equal(gradient, expected[1])
