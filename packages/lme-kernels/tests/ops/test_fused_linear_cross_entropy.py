"""Fused linear cross-entropy against a dense formula in float64, chunked and whole."""

import pytest
import torch
from torch.nn import functional as F

from lme_kernels.functional import fused_linear_cross_entropy
from lme_kernels.ops.fused_linear_cross_entropy import (
    FUSED_LINEAR_CROSS_ENTROPY,
    chunks,
    linear,
)
from lme_kernels.testing import (
    assert_matches,
    check_against_reference,
    device_for,
    dtypes_for,
    fused_backends,
)

BACKENDS = ["torch", *fused_backends(FUSED_LINEAR_CROSS_ENTROPY)]
OPTIONS = [
    {},
    {"label_smoothing": 0.1},
    {"z_loss": 0.02},
    {"softcap": 5.0},
    {"logit_scale": 0.3, "ignore_index": 3},
    {"label_smoothing": 0.2, "z_loss": 0.01, "softcap": 4.0, "logit_scale": 1.7},
]
MIB = 1 << 20


def named(options):
    return "+".join(options) or "plain"


@pytest.fixture(params=[None, 4], ids=["whole", "chunked"])
def chunked(request, monkeypatch):
    if request.param is not None:
        monkeypatch.setattr(chunks, "CPU_CHUNK_BYTES", 0)
        monkeypatch.setattr(chunks, "CPU_ROWS", request.param)


def dense(
    x,
    weight,
    labels,
    *,
    label_smoothing=0.0,
    z_loss=0.0,
    softcap=None,
    logit_scale=1.0,
    ignore_index=-100,
    reduction="mean",
):
    """Every logit at once, and torch's own cross-entropy."""
    z = (x @ weight.t()) * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    rows = F.cross_entropy(
        z, labels, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction="none"
    )
    kept = labels != ignore_index
    rows = rows + z_loss * z.logsumexp(-1) ** 2 * kept
    if reduction == "none":
        return rows
    return rows.sum() if reduction == "sum" else rows.sum() / kept.sum()


def call(T=10, H=12, V=37, dtype=torch.float32):
    x, weight = torch.randn(T, H, dtype=dtype), torch.randn(V, H, dtype=dtype)
    labels = torch.randint(0, V, (T,))
    labels[1::4] = -100
    return x, weight, labels


def results(function, x, weight, labels, grad=None, **options):
    """The loss, and the gradients of `x` and `weight` for a gradient of the loss that is not 1."""
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    loss = function(x, weight, labels, **options)
    grad = torch.tensor(-1.7) if grad is None else grad
    gradients = torch.autograd.grad(loss, (x, weight), grad.to(loss).expand_as(loss))
    return [loss.detach(), *gradients]


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("options", OPTIONS, ids=named)
def test_the_reference_is_the_dense_formula(options, reduction):
    x, weight, labels = call(dtype=torch.float64)
    if "ignore_index" in options:
        labels = labels.where(labels >= 0, options["ignore_index"])
    grad = torch.randn(10) if reduction == "none" else None
    options = {**options, "reduction": reduction}
    exact = results(dense, x, weight, labels, grad, **options)
    ours = results(fused_linear_cross_entropy, x, weight, labels, grad, backend="torch", **options)
    for actual, expected in zip(ours, exact, strict=True):
        assert_matches(actual, expected)


# The example calls prove them in one chunk.
@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("chunked", [4], indirect=True)
@pytest.mark.parametrize("options", OPTIONS, ids=named)
@pytest.mark.parametrize("backend", fused_backends(FUSED_LINEAR_CROSS_ENTROPY))
def test_kernels_match_the_reference(backend, options):
    x, weight, labels = call()
    if "ignore_index" in options:
        labels = labels.where(labels >= 0, options["ignore_index"])
    for dtype in dtypes_for(backend):
        for reduction, accumulate in (("mean", torch.float32), ("none", None)):
            check_against_reference(
                fused_linear_cross_entropy,
                (x, weight, labels),
                {**options, "reduction": reduction, "grad_accum_dtype": accumulate},
                backend=backend,
                dtype=dtype,
            )


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[-1]], ids=named)
@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_may_lie_in_one_buffer_with_padded_rows(backend, options, monkeypatch):
    """As they do on a GPU: chunk after chunk in the same memory, rows at multiples of 64."""
    monkeypatch.setattr(linear, "_takes_one_buffer", lambda x: True)
    x, weight, labels = (each.to(device_for(backend)) for each in call())
    kept = poison_empty_memory(monkeypatch)
    for reduction in ("sum", "none"):
        exact = results(dense, x.double(), weight.double(), labels, reduction=reduction, **options)
        ours = results(
            fused_linear_cross_entropy,
            x,
            weight,
            labels,
            reduction=reduction,
            backend=backend,
            **options,
        )
        for actual, expected in zip(ours, exact, strict=True):
            assert_matches(actual, expected.float())
    assert kept


def poison_empty_memory(monkeypatch):
    """What stands in the padding must not matter, so let it be the worst."""
    new_empty, made = torch.Tensor.new_empty, []

    def poisoned(self, size, **options):
        tensor = new_empty(self, size, **options)
        if isinstance(size, tuple) and len(size) == 2 and tensor.is_floating_point():
            made.append(tensor.fill_(float("nan")))
        return tensor

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    return made


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_are_right_however_often_they_are_asked_for(backend):
    where = device_for(backend)
    x, weight, labels = (each.to(where) for each in call())
    exact = results(dense, x.double(), weight.double(), labels, torch.tensor(2.0))
    x.requires_grad_()
    weight.requires_grad_()
    loss = fused_linear_cross_entropy(x, weight, labels, backend=backend)
    grad = torch.tensor(2.0, device=where)
    first = torch.autograd.grad(loss, (x, weight), grad, retain_graph=True)
    kept = [each.clone() for each in first]
    second = torch.autograd.grad(loss, (x, weight), grad / 2, retain_graph=True)
    third = torch.autograd.grad(loss, (x, weight), grad)
    for index in range(2):
        assert_matches(first[index], exact[1 + index].float())
        # Later backwards leave alone what earlier ones gave, and give the same bits again.
        assert torch.equal(first[index], kept[index])
        assert torch.equal(third[index], first[index])
        assert_matches(second[index] * 2, exact[1 + index].float())


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_what_is_needed_is_computed(backend):
    where = device_for(backend)
    x, weight, labels = (each.to(where) for each in call())
    exact = results(dense, x.double(), weight.double(), labels, torch.tensor(1.0))
    for needs_x, needs_weight in ((True, False), (False, True)):
        leaves = [x.detach().requires_grad_(needs_x), weight.detach().requires_grad_(needs_weight)]
        fused_linear_cross_entropy(*leaves, labels, backend=backend).backward()
        for leaf, needed, expected in zip(leaves, (needs_x, needs_weight), exact[1:], strict=True):
            if needed:
                assert_matches(leaf.grad, expected.float())
            else:
                assert leaf.grad is None
    with torch.no_grad():
        loss = fused_linear_cross_entropy(
            x.requires_grad_(), weight.requires_grad_(), labels, backend=backend
        )
    assert not loss.requires_grad
    assert_matches(loss, exact[0].float())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_operands_may_have_strides_and_labels_32_bits(reduction, backend):
    where = device_for(backend)
    x = torch.randn(12, 10, device=where).t()
    weight = torch.randn(37, 24, device=where)[:, ::2]
    labels = torch.randint(0, 37, (20,), device=where)[::2]
    short = labels.int()
    grad = torch.randn(20, device=where)[::2] if reduction == "none" else None
    exact = results(dense, x.double(), weight.double(), labels, grad, reduction=reduction)
    ours = results(
        fused_linear_cross_entropy, x, weight, short, grad, reduction=reduction, backend=backend
    )
    for actual, expected in zip(ours, exact, strict=True):
        assert_matches(actual, expected.float())


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows_one_row_and_no_targets(backend):
    where = device_for(backend)
    x, weight, labels = (each.to(where) for each in call(T=1))
    labels = labels.clamp(min=0)
    one = results(fused_linear_cross_entropy, x, weight, labels, backend=backend)
    for actual, expected in zip(
        one, results(dense, x.double(), weight.double(), labels), strict=True
    ):
        assert_matches(actual, expected.float())
    for rows, reduction in ((x[:0], "sum"), (x[:0], "mean"), (x, "mean"), (x, "none")):
        loss, *gradients = results(
            fused_linear_cross_entropy,
            rows,
            weight,
            torch.full((rows.shape[0],), -100, device=where),
            reduction=reduction,
            backend=backend,
        )
        assert torch.isnan(loss) if reduction == "mean" else not loss.any()
        assert [each.shape for each in gradients] == [rows.shape, weight.shape]
        for gradient in gradients:
            assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("backend", BACKENDS)
def test_float16_keeps_small_probabilities(backend):
    """The mean over many rows divides gradients that float16 could not hold after the division."""
    where = device_for(backend)
    T, V = 2048, 64
    x = torch.randn(T, 16, device=where).half()
    weight = (torch.randn(V, 16, device=where) * 0.02).half()
    labels = torch.randint(0, 4, (T,), device=where)
    exact = results(dense, x.double(), weight.double(), labels, torch.tensor(1.0))[2]
    leaf = weight.detach().requires_grad_()
    if backend != "torch":
        T = 64
        x, labels = x[:T], labels[:T]
        exact = results(dense, x.double(), weight.double(), labels, torch.tensor(1.0))[2]
    loss = fused_linear_cross_entropy(x, leaf, labels, backend=backend)
    # As a loss scaler does, so that the result itself can be held.
    (gradient,) = torch.autograd.grad(loss * 1024.0, leaf)
    # Logits are rounded to float16: of size 0.1, to 5e-5 each.
    difference = (gradient.double() / 1024 - exact)[4:]
    assert float(difference.norm() / exact[4:].norm()) < 2e-3


def test_the_weights_gradient_is_summed_in_float32_unless_asked():
    T, H, V = 4096, 8, 16
    x, weight = torch.randn(T, H) + 1.0, torch.randn(V, H)
    labels = torch.randint(0, V, (T,))
    x, weight = x.bfloat16(), weight.bfloat16()
    exact = results(dense, x.double(), weight.double(), labels, torch.tensor(1.0))[2]
    errors = {}
    for accumulate in (torch.float32, None):
        ours = results(
            fused_linear_cross_entropy,
            x,
            weight,
            labels,
            torch.tensor(1.0),
            grad_accum_dtype=accumulate,
            backend="torch",
        )[2]
        assert ours.dtype == torch.bfloat16
        errors[accumulate] = float((ours.double() - exact).norm() / exact.norm())
    # Logits are rounded to bf16 in both; sums in bf16 add an error of their own.
    assert errors[torch.float32] < 1e-2
    assert errors[torch.float32] <= errors[None] * 1.05


@pytest.mark.parametrize(
    ("T", "H", "accumulate", "most_mib"),
    [
        (8192, 2048, torch.float32, 1.7 * 1024),
        (16384, 4096, torch.float32, 3.1 * 1024),
        (8192, 2048, torch.bfloat16, 700),
        (16384, 4096, torch.bfloat16, 1.5 * 1024),
    ],
)
def test_chunks_keep_within_the_memory_promised(T, H, accumulate, most_mib):
    V, wide = 128256, accumulate == torch.float32
    rows = chunks.rows_of_chunk(T, V, H, 2, accumulate.itemsize, 132)
    sums, grad_weight, grad_x = V * H * accumulate.itemsize, V * H * 2 * wide, T * H * 2
    peak = max(sums + grad_x + rows * V * 2, sums + grad_weight + grad_x)
    assert peak / MIB <= most_mib
    # Four chunks a product of the whole cost little; more rows than memory has are no use.
    assert rows >= (2048 if wide else 512)


def test_chunks_cover_all_rows_once(monkeypatch):
    monkeypatch.setattr(chunks, "CPU_CHUNK_BYTES", 0)
    monkeypatch.setattr(chunks, "CPU_ROWS", 4)
    weight = torch.empty(5, 2)
    for T in (0, 1, 4, 9):
        slices = chunks.chunks_of(torch.empty(T, 2), weight, torch.float32)
        assert [i for each in slices for i in range(T)[each]] == list(range(T))
    assert chunks.rows_of_chunk(100, 1000, 64, 2, 4, 132) == 100
    assert chunks.rows_of_chunk(10**6, 50257, 768, 2, 4, 132) % 128 == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 4)}, r"`x` and `weight` must have shapes"),
        ({"x": torch.zeros(2, 3).half()}, r"`weight` must have the dtype torch.float16 of `x`"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, r"`labels` must have shape \(2,\)"),
        ({"softcap": -1.0}, "`softcap`"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change, message):
    arguments = {
        "x": torch.zeros(2, 3),
        "weight": torch.zeros(5, 3),
        "labels": torch.zeros(2, dtype=torch.int64),
    }
    with pytest.raises(ValueError, match=message):
        fused_linear_cross_entropy(**{**arguments, **change})


@pytest.mark.gpu
@pytest.mark.parametrize("accumulate", [torch.float32, None], ids=str)
# Llama 3's vocabulary in several chunks; an odd one, whose rows are padded.
@pytest.mark.parametrize(("T", "H", "V"), [(3000, 256, 128256), (5000, 768, 50257)])
def test_large_vocabularies_on_a_gpu(T, H, V, accumulate):
    x, weight, labels = call(T, H, V)
    weight = weight / H**0.5
    for options in (OPTIONS[0], OPTIONS[-1], {"reduction": "none"}):
        check_against_reference(
            fused_linear_cross_entropy,
            (x, weight, labels),
            {**options, "grad_accum_dtype": accumulate},
            backend="triton",
            dtype=torch.bfloat16,
        )


@pytest.mark.gpu
def test_products_add_to_float32_as_they_are(monkeypatch):
    x = torch.randn(96, 80, device="cuda", dtype=torch.bfloat16)
    grad = torch.randn(96, 1000, device="cuda", dtype=torch.bfloat16)
    expected = 2 * (grad.double().t() @ x.double())
    # Both ways, the second by slices of 256 rows.
    for adds in (linear._adds_in_float32, lambda device, dtype: False):
        monkeypatch.setattr(linear, "_adds_in_float32", adds)
        monkeypatch.setattr(linear, "SLICE_BYTES", 1)
        total = linear._add_product(None, grad, x, torch.float32)
        total = linear._add_product(total, grad, x, torch.float32)
        assert_matches(total, expected.float())


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("T", "H", "accumulate", "most_mib"),
    [
        (8192, 2048, torch.float32, 1.7 * 1024),
        (8192, 2048, None, 700),
        (16384, 4096, torch.float32, 3.1 * 1024),
        (16384, 4096, None, 1.5 * 1024),
    ],
)
def test_peak_memory_is_what_is_promised(T, H, accumulate, most_mib):
    V = 128256
    x = torch.randn(T, H, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(V, H, device="cuda", dtype=torch.bfloat16).mul_(0.02).requires_grad_()
    labels = torch.randint(0, V, (T,), device="cuda")

    def step():
        loss = fused_linear_cross_entropy(
            x, weight, labels, grad_accum_dtype=accumulate, backend="triton"
        )
        loss.backward()
        x.grad = weight.grad = None

    # Once before, so that the matrix products' workspace is there.
    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    extra = (torch.cuda.max_memory_allocated() - before) / MIB
    assert extra <= most_mib
