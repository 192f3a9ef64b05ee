"""Divergence from a teacher's top classes against its definition in float64."""

import pytest
import torch

from lme_kernels.functional import fused_linear_kl_div, fused_linear_topk_kl_div
from lme_kernels.ops.fused_linear_cross_entropy import chunks, linear
from lme_kernels.ops.fused_linear_topk_kl_div import FUSED_LINEAR_TOPK_KL_DIV
from lme_kernels.testing import (
    assert_matches,
    check_against_reference,
    device_for,
    dtypes_for,
    fused_backends,
)

BACKENDS = ["torch", *fused_backends(FUSED_LINEAR_TOPK_KL_DIV)]
CASES = [
    {"tail": tail, "direction": direction, "beta": 0.3, "temperature": 1.3}
    for tail in ("bin", "renormalise", "ignore")
    for direction in ("student_teacher", "teacher_student", "jsd")
]


def named(options):
    return f"{options['tail']}-{options['direction']}"


@pytest.fixture(params=[None, 4], ids=["whole", "chunked"])
def chunked(request, monkeypatch):
    if request.param is not None:
        monkeypatch.setattr(chunks, "CPU_CHUNK_BYTES", 0)
        monkeypatch.setattr(chunks, "CPU_ROWS", request.param)


def dense(x, weight, idx, log_q, labels, *, tail, direction, beta, temperature, reduction="mean"):
    """Row by row, over the classes that are there, with probabilities."""
    rows = []
    for t in range(x.shape[0]):
        p_all = (weight.double() @ x[t].double() / temperature).softmax(-1)
        there = log_q[t] > -torch.inf
        p, q = p_all[idx[t][there]], log_q[t][there].double().exp()
        if tail == "bin":
            p = torch.cat([p, 1 - p.sum()[None]])
            q = torch.cat([q, 1 - q.sum()[None]])
        if tail == "renormalise":
            p, q = p / p.sum(), q / q.sum()
        m = beta * q + (1 - beta) * p
        rows.append(
            {
                "student_teacher": lambda p=p, q=q: (p * (p / q).log()).sum(),
                "teacher_student": lambda p=p, q=q: (q * (q / p).log()).sum(),
                "jsd": lambda p=p, q=q, m=m: (
                    beta * (q * (q / m).log()).sum() + (1 - beta) * (p * (p / m).log()).sum()
                ),
            }[direction]()
        )
    kept = labels != -100
    rows = torch.stack(rows) * kept
    if reduction == "none":
        return rows
    return rows.sum() if reduction == "sum" else rows.sum() / kept.sum()


def call(T=9, H=12, V=37, K=5, dtype=torch.float32, where="cpu"):
    x, weight = torch.randn(T, H, dtype=dtype) / 2, torch.randn(V, H, dtype=dtype)
    log_q, idx = torch.randn(T, V, dtype=dtype).log_softmax(-1).topk(K, dim=-1)
    # Entries that are not there may repeat a class, or name none.
    log_q[0, -1] = log_q[2, -1] = -torch.inf
    idx[0, -1], idx[2, -1] = idx[0, 0], -1
    idx = idx.int()
    labels = torch.zeros(T, dtype=torch.int64)
    labels[1::4] = -100
    return [each.to(where) for each in (x, weight, idx, log_q, labels)]


def results(function, arguments, grad=None, **options):
    x, weight, *others = arguments
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    loss = function(x, weight, *others, **options)
    grad = torch.tensor(-1.7) if grad is None else grad
    gradients = torch.autograd.grad(loss, (x, weight), grad.to(loss).expand_as(loss))
    return [loss.detach(), *gradients]


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("options", CASES, ids=named)
def test_the_reference_is_the_definition(options):
    arguments = call(dtype=torch.float64)
    for reduction in ("none", "mean"):
        grad = torch.randn(9) if reduction == "none" else None
        exact = results(dense, arguments, grad, reduction=reduction, **options)
        ours = results(
            fused_linear_topk_kl_div,
            arguments,
            grad,
            reduction=reduction,
            backend="torch",
            **options,
        )
        for actual, expected in zip(ours, exact, strict=True):
            assert_matches(actual, expected)


# The example calls prove them in one chunk.
@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("chunked", [4], indirect=True)
@pytest.mark.parametrize("options", CASES, ids=named)
@pytest.mark.parametrize("backend", fused_backends(FUSED_LINEAR_TOPK_KL_DIV))
def test_kernels_match_the_reference(backend, options, monkeypatch):
    # As on a GPU: logits in one buffer, rows at multiples of 64. The example calls do without.
    monkeypatch.setattr(linear, "_takes_one_buffer", lambda x: True)
    arguments = call()
    for dtype, reduction in zip(dtypes_for(backend), ("mean", "none", "sum"), strict=False):
        check_against_reference(
            fused_linear_topk_kl_div,
            arguments,
            {**options, "reduction": reduction},
            backend=backend,
            dtype=dtype,
            constants=(3,),
        )


@pytest.mark.parametrize("direction", ["student_teacher", "teacher_student", "jsd"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_all_classes_give_the_divergence_from_the_whole_teacher(backend, direction):
    where = device_for(backend)
    x, weight, logits = (torch.randn(*shape, device=where) for shape in ((6, 8), (20, 8), (6, 20)))
    log_q, idx = logits.log_softmax(-1).sort(dim=-1)
    whole = results(fused_linear_kl_div, (x, weight, logits), direction=direction, backend=backend)
    for tail in ("bin", "renormalise", "ignore"):
        ours = results(
            fused_linear_topk_kl_div,
            (x, weight, idx, log_q),
            direction=direction,
            tail=tail,
            backend=backend,
        )
        for actual, expected in zip(ours, whole, strict=True):
            # The rest of both sides is nothing but the rounding of 1 - sum, 1e-7 of it.
            assert float((actual - expected).abs().max()) < 2e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_without_entries_no_rows_and_no_targets(backend):
    x, weight, idx, log_q, labels = call(where=device_for(backend))
    for tail in ("renormalise", "ignore"):
        loss, *gradients = results(
            fused_linear_topk_kl_div,
            (x, weight, idx, torch.full_like(log_q, -torch.inf)),
            tail=tail,
            backend=backend,
        )
        assert loss == 0
        assert not any(each.any() for each in gradients)
    nothing = (x, weight, idx, log_q, torch.full_like(labels, -100))
    loss, *gradients = results(fused_linear_topk_kl_div, nothing, backend=backend)
    assert torch.isnan(loss)
    assert not any(each.any() for each in gradients)
    empty = (x[:0], weight, idx[:0], log_q[:0])
    loss, *gradients = results(fused_linear_topk_kl_div, empty, reduction="sum", backend=backend)
    assert loss == 0
    assert not any(each.any() for each in gradients)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tail": "drop"}, "`tail`"),
        ({"direction": "both"}, "`direction`"),
        ({"teacher_idx": torch.zeros(3, 4, dtype=torch.int64)}, r"`teacher_idx` must have shape"),
        ({"teacher_logprob": torch.zeros(2, 3)}, r"`teacher_logprob` must have shape \(2, 4\)"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change, message):
    arguments = {
        "x": torch.zeros(2, 3),
        "weight": torch.zeros(5, 3),
        "teacher_idx": torch.zeros(2, 4, dtype=torch.int64),
        "teacher_logprob": torch.zeros(2, 4),
    }
    with pytest.raises(ValueError, match=message):
        fused_linear_topk_kl_div(**{**arguments, **change})


@pytest.mark.gpu
@pytest.mark.parametrize("options", CASES, ids=named)
def test_large_vocabularies_on_a_gpu(options):
    check_against_reference(
        fused_linear_topk_kl_div,
        call(1500, 128, 50257, K=64),
        options,
        backend="triton",
        dtype=torch.bfloat16,
        constants=(3,),
    )
