"""Divergence from a teacher against its definition in float64, differentiated by autograd."""

import pytest
import torch

from lme_kernels.functional import fused_linear_kl_div
from lme_kernels.ops.fused_linear_cross_entropy import chunks, linear
from lme_kernels.ops.fused_linear_kl_div import FUSED_LINEAR_KL_DIV
from lme_kernels.testing import (
    assert_matches,
    check_against_reference,
    device_for,
    dtypes_for,
    fused_backends,
)

BACKENDS = ["torch", *fused_backends(FUSED_LINEAR_KL_DIV)]
DIRECTIONS = [
    {"direction": "student_teacher", "temperature": 1.6},
    {"direction": "teacher_student"},
    {"direction": "jsd", "beta": 0.3, "temperature": 0.8},
]


def named(options):
    return options["direction"]


@pytest.fixture(params=[None, 4], ids=["whole", "chunked"])
def chunked(request, monkeypatch):
    if request.param is not None:
        monkeypatch.setattr(chunks, "CPU_CHUNK_BYTES", 0)
        monkeypatch.setattr(chunks, "CPU_ROWS", request.param)


def dense(
    x,
    weight,
    teacher,
    teacher_weight,
    labels,
    *,
    direction,
    beta=0.5,
    temperature=1.0,
    reduction="mean",
):
    """The definition with probabilities, not logarithms."""
    p = (x.double() @ weight.double().t() / temperature).softmax(-1)
    q = (teacher.double() @ teacher_weight.double().t() / temperature).softmax(-1)

    def divergence(a, b):
        return (a * (a / b).log()).sum(-1)

    if direction == "jsd":
        m = beta * q + (1 - beta) * p
        rows = beta * divergence(q, m) + (1 - beta) * divergence(p, m)
    else:
        rows = divergence(p, q) if direction == "student_teacher" else divergence(q, p)
    kept = labels != -100
    rows = rows * kept
    if reduction == "none":
        return rows
    return rows.sum() if reduction == "sum" else rows.sum() / kept.sum()


def call(T=10, H=12, V=37, dtype=torch.float32, where="cpu"):
    x, weight = torch.randn(T, H, dtype=dtype) / 2, torch.randn(V, H, dtype=dtype) / 2
    teacher, teacher_weight = torch.randn(T, 7, dtype=dtype), torch.randn(V, 7, dtype=dtype) / 2
    labels = torch.zeros(T, dtype=torch.int64)
    labels[1::4] = -100
    return [each.to(where) for each in (x, weight, teacher, teacher_weight, labels)]


def results(function, arguments, grad=None, **options):
    x, weight, *others = arguments
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    loss = function(x, weight, *others, **options)
    grad = torch.tensor(-1.7) if grad is None else grad
    gradients = torch.autograd.grad(loss, (x, weight), grad.to(loss).expand_as(loss))
    return [loss.detach(), *gradients]


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("options", DIRECTIONS, ids=named)
def test_the_reference_is_the_definition(options, reduction):
    arguments = call(dtype=torch.float64)
    grad = torch.randn(10) if reduction == "none" else None
    options = {**options, "reduction": reduction}
    exact = results(dense, arguments, grad, **options)
    ours = results(fused_linear_kl_div, arguments, grad, backend="torch", **options)
    for actual, expected in zip(ours, exact, strict=True):
        assert_matches(actual, expected)


# The example calls prove them in one chunk.
@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("chunked", [4], indirect=True)
@pytest.mark.parametrize("options", DIRECTIONS, ids=named)
@pytest.mark.parametrize("backend", fused_backends(FUSED_LINEAR_KL_DIV))
@pytest.mark.parametrize("padded", [False, True])
def test_kernels_match_the_reference(backend, padded, options, monkeypatch):
    if padded:
        # As on a GPU: logits in one buffer, rows at multiples of 64.
        monkeypatch.setattr(linear, "_takes_one_buffer", lambda x: True)
    for dtype in dtypes_for(backend):
        for reduction in ("mean", "none"):
            check_against_reference(
                fused_linear_kl_div,
                call(),
                {**options, "reduction": reduction},
                backend=backend,
                dtype=dtype,
                constants=(2, 3),
            )


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("chunked", [4], indirect=True)
@pytest.mark.parametrize("options", DIRECTIONS, ids=named)
@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_of_the_teacher_may_be_given_or_made_by_a_function(backend, options):
    x, weight, teacher, teacher_weight, labels = call(where=device_for(backend))
    logits = teacher @ teacher_weight.t()
    seen = []

    def provide(rows):
        seen.append(rows)
        return logits[rows]

    exact = results(dense, (x, weight, teacher, teacher_weight, labels), **options)
    # Given, strided, made.
    for teacher in (logits, logits.t().contiguous().t(), provide):
        ours = results(
            fused_linear_kl_div, (x, weight, teacher, None, labels), backend=backend, **options
        )
        for actual, expected in zip(ours, exact, strict=True):
            assert_matches(actual, expected.float())
    # The gradients of a scalar are made as the loss is: one look at each row.
    assert sum(rows.stop - rows.start for rows in seen) == 10


@pytest.mark.parametrize("options", DIRECTIONS, ids=named)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_student_that_is_the_teacher_has_no_loss_and_no_gradient(backend, options):
    x, weight, _, _, _ = call(where=device_for(backend))
    loss, *gradients = results(
        fused_linear_kl_div, (x, weight, x, weight), torch.tensor(1.0), backend=backend, **options
    )
    # Differences of logarithms of size 5, each rounded to float32.
    assert abs(float(loss)) < 3e-6
    for gradient in gradients:
        assert float(gradient.abs().max()) < 3e-6


@pytest.mark.parametrize("options", DIRECTIONS, ids=named)
@pytest.mark.parametrize("backend", BACKENDS)
def test_classes_that_both_sides_exclude_do_not_count(backend, options):
    where = device_for(backend)
    x, weight = torch.ones(5, 1, device=where), torch.randn(20, 1, device=where)
    teacher = torch.randn(5, 20, device=where)
    weight[11:] = teacher[:, 11:] = -float("inf")
    labels = torch.zeros(5, device=where)
    few = (x, weight[:11], teacher[:, :11], torch.eye(11, device=where), labels)
    exact = dense(*few, reduction="none", **options)
    ours = fused_linear_kl_div(
        x, weight, teacher, None, labels, reduction="none", backend=backend, **options
    )
    assert_matches(ours, exact.float())


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows_and_no_targets(backend):
    x, weight, teacher, teacher_weight, labels = call(where=device_for(backend))
    arguments = (x[:0], weight, teacher[:0], teacher_weight)
    loss, *gradients = results(fused_linear_kl_div, arguments, reduction="sum", backend=backend)
    assert loss == 0
    assert not gradients[1].any()
    arguments = (x, weight, teacher, teacher_weight, torch.full_like(labels, -100))
    loss, *gradients = results(fused_linear_kl_div, arguments, backend=backend)
    assert torch.isnan(loss)
    assert not any(each.any() for each in gradients)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_gradient_flows_to_the_teacher_and_a_second_backward_is_the_same(backend):
    x, weight, teacher, teacher_weight, labels = call(where=device_for(backend))
    leaves = [each.requires_grad_() for each in (x, weight, teacher, teacher_weight)]
    loss = fused_linear_kl_div(*leaves, labels, backend=backend)
    once, again = (
        torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True) for _ in range(2)
    )
    assert once[2] is None
    assert once[3] is None
    for ours, theirs in zip(once[:2], again[:2], strict=True):
        assert torch.equal(ours, theirs)
    with torch.no_grad():
        assert_matches(fused_linear_kl_div(*leaves, labels, backend=backend), loss.detach())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"direction": "forward"}, r"`direction` must be .*KL\(student \|\| teacher\).*`forward`"),
        ({"beta": 1.0}, "`beta`"),
        ({"temperature": 0.0}, "`temperature`"),
        ({"teacher_weight": torch.zeros(6, 3)}, "share a vocabulary"),
        ({"teacher_weight": None}, "share a vocabulary"),
        ({"teacher_weight": torch.zeros(5, 3).half()}, "`teacher_weight` must have the dtype"),
        ({"teacher": lambda rows: torch.zeros(2, 5)}, "`teacher_weight` must be `None`"),
        ({"teacher": lambda rows: torch.zeros(2, 4), "teacher_weight": None}, "must return logits"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change, message):
    arguments = {
        "x": torch.zeros(2, 3),
        "weight": torch.zeros(5, 3),
        "teacher": torch.zeros(2, 3),
        "teacher_weight": torch.zeros(5, 3),
    }
    with pytest.raises(ValueError, match=message):
        fused_linear_kl_div(**{**arguments, **change})


@pytest.mark.gpu
@pytest.mark.parametrize("options", DIRECTIONS, ids=named)
@pytest.mark.parametrize("V", [128256, 50257])
def test_large_vocabularies_on_a_gpu(V, options):
    check_against_reference(
        fused_linear_kl_div,
        call(1500, 128, V),
        options,
        backend="triton",
        dtype=torch.bfloat16,
        constants=(2, 3),
    )
