"""Windows and packed documents by the FlashAttention in torch, which runs on a GPU only."""

import pytest
import torch

from lme_kernels.functional import attention
from lme_kernels.inspection import count_calls
from lme_kernels.ops.attention import ATTENTION, _flash_attention_2, _flash_varlen
from lme_kernels.ops.attention.options import AttentionOptions
from lme_kernels.testing import check_against_reference, run

# Documents of one, of several tokens, an empty one, and one that ends with its row.
DOCUMENTS = torch.tensor([0, 4, 9, 9, 10, 18], dtype=torch.int32)
CALLS = {
    "causal": ({}, {}),
    "not causal": ({"T": 11}, {"causal": False, "scale": 0.3}),
    "last queries": ({"S": 3}, {}),
    "window": ({}, {"window": 3}),
    "window of one": ({}, {"window": 1}),
    "window, not causal": ({}, {"window": 3, "causal": False}),
    "window of all": ({}, {"window": 20}),
    "window, last queries": ({"S": 3}, {"window": 4}),
    "documents": ({}, {"cu_seqlens": DOCUMENTS}),
    "documents, int64": ({}, {"cu_seqlens": DOCUMENTS.long()}),
    "documents, window": ({}, {"cu_seqlens": DOCUMENTS, "window": 2}),
    "documents, not causal": ({}, {"cu_seqlens": DOCUMENTS, "causal": False}),
}


def qkv(B=2, S=9, T=9, N=4, K=2, D=8):
    return [torch.randn(shape) for shape in ((B, S, N, D), (B, T, K, D), (B, T, K, D))]


def flash(query, key, value, starts_q, starts_k, causal, scale, left, right):
    """What FlashAttention documents: the last query of a document is aligned with its last key."""
    rows, sums = [], []
    right = 0 if causal else right
    for document in range(len(starts_q) - 1):
        q, k, v = (
            each[starts[document] : starts[document + 1]]
            for each, starts in ((query, starts_q), (key, starts_k), (value, starts_k))
        )
        k, v = (each.repeat_interleave(q.shape[1] // k.shape[1], 1) for each in (k, v))
        scores = torch.einsum("snd,tnd->nst", q, k) * scale
        here = torch.arange(len(q)).unsqueeze(-1) + len(k) - len(q)
        ahead = torch.arange(len(k)) - here
        hidden = torch.zeros_like(ahead, dtype=torch.bool)
        if left >= 0:
            hidden = hidden | (ahead < -left)
        if right >= 0:
            hidden = hidden | (ahead > right)
        scores = scores.masked_fill(hidden, float("-inf"))
        rows.append(torch.einsum("nst,tnd->snd", scores.softmax(-1), v))
        sums.append(scores.logsumexp(-1))
    return torch.cat(rows), torch.cat(sums, -1)


@pytest.fixture
def kernels(monkeypatch):
    """Put emulations in the place of torch's kernels; list the deterministic flag of backwards."""
    flags = []

    def forward(*args, scale, window_size_left, window_size_right):
        query, key, value, starts_q, starts_k, max_q, max_k, dropout, causal, debug = args
        assert (dropout, debug) == (0.0, False)
        assert starts_q.dtype == starts_k.dtype == torch.int32
        assert starts_q.diff().max() <= max_q
        assert starts_k.diff().max() <= max_k
        tensors = (query, key, value, starts_q, starts_k)
        y, lse = flash(*tensors, causal, scale, window_size_left, window_size_right)
        return y, lse, None, None, None

    def backward(*args, scale, window_size_left, window_size_right):
        grad, query, key, value, _, lse, starts_q, starts_k, _, _, dropout, causal, _, _ = args
        assert dropout == 0.0
        flags.append(torch.are_deterministic_algorithms_enabled())
        leaves = [each.detach().requires_grad_() for each in (query, key, value)]
        with torch.enable_grad():
            y, again = flash(
                *leaves, starts_q, starts_k, causal, scale, window_size_left, window_size_right
            )
        torch.testing.assert_close(again, lse)
        return torch.autograd.grad(y, leaves, grad)

    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", forward)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_backward", backward)
    return flags


def call(implementation, query, key, value, *, cu_seqlens=None, **options):
    tensors = (query, key, value, cu_seqlens, None, None)
    return implementation(*tensors, AttentionOptions(**options))


@pytest.mark.parametrize("name", CALLS)
def test_the_kernels_are_given_the_same_meaning(name, kernels):
    sizes, options = CALLS[name]
    arguments = qkv(**sizes)
    ours, theirs = (
        run(lambda *each, f=f: call(f, *each, **options), arguments, {})
        for f in (_flash_varlen.attention, ATTENTION.reference)
    )
    pairs = zip((*ours.outputs, *ours.gradients), (*theirs.outputs, *theirs.gradients), strict=True)
    for mine, other in pairs:
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("deterministic", [False, True])
def test_the_backward_is_deterministic_where_it_is_asked_for(before, deterministic, kernels):
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(before)
    try:
        run(
            lambda *each: call(
                _flash_varlen.attention, *each, window=2, deterministic=deterministic
            ),
            qkv(),
            {},
        )
        assert kernels == [before or deterministic]
        assert torch.are_deterministic_algorithms_enabled() == before
    finally:
        torch.use_deterministic_algorithms(False, warn_only=warns)


def shapes(*results):
    return [(each.shape, each.dtype, each.stride()) for each in results]


@pytest.mark.parametrize("dense", [True, False])
def test_torchs_kernels_take_the_arguments_and_give_what_the_compiler_is_told(dense):
    # Torch knows what its kernels return for tensors without memory, and checks the arguments.
    B, S, N, K, D = 2, 9, 4, 2, 64
    both = torch.empty(B * S, N + 2 * K, D, device="meta", dtype=torch.bfloat16)
    query, key, value = both.split((N, K, K), 1)
    if dense:
        query = query.transpose(0, 1).contiguous().transpose(0, 1)
    starts = torch.empty(B + 1, device="meta", dtype=torch.int32)
    options = (starts, starts, S, S, True, 0.1, 2, 0)
    forward = torch.ops.lme_kernels.attention_flash_varlen_forward
    y, lse = forward(query, key, value, *options)
    assert shapes(y, lse) == shapes(*_flash_varlen._fake_forward(query, key, value, *options))
    backward = torch.ops.lme_kernels.attention_flash_varlen_backward
    gradients = backward(y, query, key, value, y, lse, *options, True)
    expected = _flash_varlen._fake_backward(y, query, key, value)
    assert shapes(*gradients) == shapes(*expected)


def test_heads_that_are_not_as_the_kernels_read_them_are_copied():
    x = torch.randn(6, 4, 24)
    assert _flash_varlen._aligned(x) is x
    assert _flash_varlen._aligned(x[:, 1:]).data_ptr() == x[:, 1:].data_ptr()
    for other in (x[..., 1:9], x[..., ::2], x.transpose(1, 2), torch.randn(6, 4, 25)[..., :24]):
        copied = _flash_varlen._aligned(other)
        assert torch.equal(copied, other)
        assert copied.is_contiguous()
        assert copied.data_ptr() % 16 == 0


@pytest.mark.parametrize(
    ("sizes", "options", "reason"),
    [
        ({"D": 12}, {}, "heads have 12 channels"),
        ({"D": 264}, {}, "heads have 264 channels"),
        ({}, {"softcap": 2.0}, "a bound on the scores"),
        ({"T": 5}, {}, "queries before the first key"),
        ({"S": 1}, {"window": 3}, "a single query"),
        ({}, {"cu_seqlens": torch.zeros(65537, dtype=torch.int32)}, "65536 documents"),
        ({}, {}, None),
        ({"D": 256}, {"window": 3, "cu_seqlens": DOCUMENTS}, None),
    ],
)
def test_why_not(sizes, options, reason, monkeypatch):
    monkeypatch.setattr(_flash_varlen, "why_not_flash", lambda *_: None)
    monkeypatch.setattr(_flash_varlen, "_why_not_device", lambda _: None)
    said = call(_flash_varlen.why_not, *qkv(**sizes), **options)
    assert said is None if reason is None else reason in said


def test_it_suits_windows_documents_and_deterministic_calls():
    assert not call(_flash_varlen.suits, *qkv())
    for options in ({"window": 3}, {"cu_seqlens": DOCUMENTS}, {"deterministic": True}):
        assert call(_flash_varlen.suits, *qkv(), **options)


def test_flash_attention_2_without_its_package_takes_windows_too(kernels):
    if _flash_attention_2.attention is not _flash_attention_2._attend_by_torchs:
        pytest.skip("the package flash-attn is installed")
    arguments = qkv()
    ours = call(_flash_attention_2.attention, *arguments, window=3)
    torch.testing.assert_close(ours, call(ATTENTION.reference, *arguments, window=3))


def test_a_compiler_takes_the_choice_for_a_constant(monkeypatch):
    def choose(x):
        return x + 1 if _flash_varlen._why_not_device(0) is None else x - 1

    compiled = torch.compile(choose, fullgraph=True, backend="eager")
    # On a machine without a GPU torch cannot be asked for its capability.
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    x = torch.zeros(2)
    assert torch.equal(compiled(x), choose(x))


HALVES = [torch.bfloat16, torch.float16]
GPU_CALLS = {
    **{f"window of {window}": (300, {"window": window}) for window in (1, 7, 128, 1000)},
    "window of whole tiles": (512, {"window": 128}),
    "window, not causal": (300, {"window": 7, "causal": False}),
    "two tokens": (2, {"window": 1}),
    "documents": (300, {"cu_seqlens": [0, 0, 1, 130, 130, 300, 555, 600, 600]}),
    "documents, window": (300, {"cu_seqlens": [0, 5, 5, 300, 429, 600], "window": 7}),
    "documents, not causal": (300, {"cu_seqlens": [0, 5, 5, 300, 600], "causal": False}),
    "deterministic": (300, {"window": 100, "deterministic": True}),
}


def matches_float64(arguments, options, dtype):
    # The kernels round weights and gradients of scores to half precision before the products.
    check_against_reference(
        attention,
        arguments,
        options,
        backend="flash_varlen",
        dtype=dtype,
        where="cuda",
        roundings=2.0,
    )


def on_gpu(options):
    starts = options.get("cu_seqlens")
    placed = {} if starts is None else {"cu_seqlens": torch.tensor(starts, dtype=torch.int32)}
    return {**options, **placed}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(("N", "K", "D"), [(4, 4, 64), (8, 2, 128), (4, 1, 256), (4, 2, 72)])
@pytest.mark.parametrize("name", GPU_CALLS)
def test_it_matches_float64(name, N, K, D, dtype):
    S, options = GPU_CALLS[name]
    arguments = qkv(2, S, S, N, K, D)
    matches_float64(arguments, on_gpu(options), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("S", [2, 65, 128])
def test_last_queries_match_float64(S):
    for window in (5, 200):
        matches_float64(qkv(2, S, 300, 4, 2, 64), {"window": window}, torch.bfloat16)


@pytest.mark.gpu
def test_tensors_with_strides_match_float64():
    both = torch.randn(2, 300, 8, 64)
    odd = torch.randn(2, 300, 4, 65)[..., 1:]
    across = torch.randn(2, 4, 300, 64).transpose(1, 2)
    for query, key, value in (
        both.split((4, 2, 2), 2),
        (odd, odd[:, :, :2], odd[:, :, 2:]),
        (across, across[:, :, :2], across[:, :, 2:]),
    ):
        matches_float64((query, key, value), {"window": 50}, torch.bfloat16)


@pytest.mark.gpu
def test_it_is_compiled_deterministic_and_captured():
    arguments = [each.cuda().bfloat16() for each in qkv(2, 300, 300, 8, 2, 64)]
    options = {"window": 50, "deterministic": True, "backend": "flash_varlen"}
    with count_calls() as counts:
        first = run(attention, arguments, options)
    assert counts == {"attention@flash_varlen": 1}
    compiled = torch.compile(attention, fullgraph=True)
    for again in (run(attention, arguments, options), run(compiled, arguments, options)):
        for mine, other in zip(
            (*again.outputs, *again.gradients), (*first.outputs, *first.gradients), strict=True
        ):
            assert torch.equal(mine, other)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad():
        expected = attention(*arguments, window=50, backend="flash_varlen")
        with torch.cuda.graph(graph):
            captured = attention(*arguments, window=50, backend="flash_varlen")
    captured.zero_()
    graph.replay()
    assert torch.equal(captured, expected)
