import math

import pytest
import torch
from torch.nn import functional as F

from lme_kernels.functional import attention
from lme_kernels.op import UnsupportedBackendError
from lme_kernels.ops.attention import ATTENTION, _flex
from lme_kernels.ops.attention.options import AttentionOptions


def qkv(B=2, S=9, T=9, N=4, K=2, D=8, Dv=8):
    shapes = (B, S, N, D), (B, T, K, D), (B, T, K, Dv)
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def loop(
    query,
    key,
    value,
    *,
    causal=True,
    scale=None,
    window=None,
    softcap=None,
    cu_seqlens=None,
    mask=None,
    sinks=None,
):
    """Attention one query and one head at a time."""
    B, S, N, D = query.shape
    T, K = key.shape[1:3]
    starts = [] if cu_seqlens is None else cu_seqlens.tolist()
    document = [sum(start <= token for start in starts) for token in range(B * S)]
    rows = []
    for b in range(B):
        for s in range(S):
            for n in range(N):
                k, v = key[b, :, n // (N // K)], value[b, :, n // (N // K)]
                scores = k @ query[b, s, n] * (1 / math.sqrt(D) if scale is None else scale)
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                if mask is not None:
                    scores = scores + mask[b, n if mask.shape[1] == N else 0, s]
                here = s + T - S
                seen = [
                    (not causal or t <= here)
                    and (window is None or abs(here - t) < window)
                    and (not starts or document[b * S + s] == document[b * S + t])
                    for t in range(T)
                ]
                scores = scores[torch.tensor(seen)]
                powers = torch.cat((scores, sinks[n : n + 1])) if sinks is not None else scores
                weights = torch.softmax(powers, 0)[: len(scores)]
                rows.append(weights @ v[torch.tensor(seen)])
    return torch.stack(rows).view(B, S, N, -1)


# Documents of one, of several tokens, an empty one, and one that ends with its row.
DOCUMENTS = torch.tensor([0, 4, 9, 9, 10, 18], dtype=torch.int32)
CALLS = {
    "causal": ({}, {}),
    "not causal": ({"T": 5}, {"causal": False}),
    "last queries": ({"S": 3}, {}),
    "one query": ({"S": 1}, {}),
    "values of another size": ({"Dv": 5}, {"scale": 0.2}),
    "window": ({}, {"window": 3}),
    "window of one": ({}, {"window": 1}),
    "window, not causal": ({}, {"window": 3, "causal": False}),
    "window, last queries": ({"S": 3}, {"window": 4}),
    "documents": ({}, {"cu_seqlens": DOCUMENTS}),
    "documents, window": ({}, {"cu_seqlens": DOCUMENTS, "window": 2}),
    "bounded": ({}, {"softcap": 0.7}),
    "mask": ({}, {"mask": torch.randn(2, 1, 9, 9, dtype=torch.float64)}),
    "mask of heads": ({}, {"mask": torch.randn(2, 4, 9, 9, dtype=torch.float64), "causal": False}),
    "sinks": ({}, {"sinks": torch.randn(4, dtype=torch.float64)}),
    "all": (
        {},
        {
            "window": 4,
            "cu_seqlens": DOCUMENTS,
            "softcap": 0.7,
            "mask": torch.randn(2, 1, 9, 9, dtype=torch.float64),
            "sinks": torch.randn(4, dtype=torch.float64),
        },
    ),
}


@pytest.mark.parametrize("backend", ["torch", None])
@pytest.mark.parametrize("name", CALLS)
def test_attention_is_a_loop_over_queries(name, backend):
    sizes, options = CALLS[name]
    inputs = qkv(**sizes)
    if "sinks" in options:
        options = {**options, "sinks": options["sinks"].clone().requires_grad_()}
        inputs = [*inputs, options["sinks"]]
    ours = attention(*inputs[:3], **options, backend=backend)
    theirs = loop(*inputs[:3], **options)
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)
    grad = torch.randn_like(ours)
    pairs = (torch.autograd.grad(y, inputs, grad) for y in (ours, theirs))
    for mine, other in zip(*pairs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("backend", ["torch", None])
def test_a_query_that_sees_no_key_gets_zeros_and_no_gradient(backend):
    query, key, value = qkv(B=1, S=3, T=3)
    mask = torch.zeros(1, 1, 3, 3, dtype=torch.float64)
    mask[..., 0, :] = float("-inf")
    y = attention(query, key, value, mask=mask, backend=backend)
    assert torch.equal(y[0, 0], torch.zeros_like(y[0, 0]))
    (grad,) = torch.autograd.grad(y.sum(), query)
    assert torch.equal(grad[0, 0], torch.zeros_like(grad[0, 0]))
    assert grad.isfinite().all()


@pytest.mark.parametrize(
    "name", ["causal", "window", "window, not causal", "documents, window", "bounded", "sinks"]
)
def test_flex_attention_is_given_the_same_meaning(name, monkeypatch):
    # Its uncompiled forward runs on a CPU, its backward does not.
    monkeypatch.setattr(_flex, "_compiled_flex", lambda: _flex.flex_attention)
    monkeypatch.setattr(_flex, "_compiled_mask", lambda: _flex.create_block_mask)
    sizes, options = CALLS[name]
    query, key, value = (x.detach().float() for x in qkv(**sizes, D=16, Dv=16))
    options = dict(options)
    cu_seqlens, sinks = options.pop("cu_seqlens", None), options.pop("sinks", None)
    tensors = (query, key, value, cu_seqlens, None, sinks)
    ours = _flex.attention(*tensors, AttentionOptions(**options))
    theirs = ATTENTION.reference(*tensors, AttentionOptions(**options))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("backend", "options", "reason"),
    [
        ("cudnn", {}, "it runs on cuda tensors, and these are on cpu"),
        ("flex", {}, "it runs on cuda tensors, and these are on cpu"),
        ("sdpa", {"softcap": 1.0}, "it cannot bound the scores"),
        ("sdpa", {"sinks": torch.zeros(4)}, "it has no `sinks`"),
        ("flash_attention_2", {}, "it runs on cuda tensors"),
    ],
)
def test_a_named_kernel_that_cannot_serve_says_why(backend, options, reason):
    with pytest.raises(UnsupportedBackendError, match=reason):
        attention(*qkv(), backend=backend, **options)


@pytest.mark.parametrize(
    ("sizes", "options", "message"),
    [
        ({"N": 3}, {}, "`query` has 3 heads, which are no multiple of the 2 of `key`"),
        ({}, {"window": 0}, "`window` must be at least 1"),
        ({}, {"softcap": -1.0}, "`softcap` must be above 0"),
        ({"S": 3}, {"cu_seqlens": DOCUMENTS}, "`cu_seqlens` needs as many keys as queries"),
        ({}, {"mask": torch.zeros(9, 9)}, "`mask` must have shape"),
        ({}, {"sinks": torch.zeros(3)}, "`sinks` must have shape"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(sizes, options, message):
    with pytest.raises(ValueError, match=message):
        attention(*qkv(**sizes), **options)


def test_torchs_attention_agrees():
    query, key, value = qkv(K=4)
    theirs = F.scaled_dot_product_attention(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), is_causal=True
    ).transpose(1, 2)
    torch.testing.assert_close(attention(query, key, value, backend="torch"), theirs)
