"""Blocks are handed to FlashAttention as its kernels want them, and their results are read right.

The kernels are replaced by what they promise: of each packed document the last query is at the last
key, and what belongs to a document without queries or keys is not written.
"""

from types import SimpleNamespace

import pytest
import torch

from lme_parallel.context import flash
from lme_parallel.context.blocks import Block, Rules, attend_block, block_gradients
from lme_parallel.context.layout import Layout
from lme_parallel.context.passes import Call, Documents

B, S, N, K, D, V = 2, 16, 4, 2, 8, 5
PACKED = torch.tensor([0, 1, 4, 9, 16, 20, 29, 32], dtype=torch.int32)
BLOCKS = {
    "own": Block(4, 4, 4, 4),
    "all before": Block(8, 0, 4, 8),
    "up to the end": Block(8, 0, 4, 12),
    "of a window": Block(8, 6, 4, 6),
}
# Name, whether documents are kept apart, window.
SERVED = [
    ("own", False, None),
    ("own", True, None),
    ("own", True, 3),
    ("all before", False, None),
    ("all before", True, None),
    ("up to the end", True, None),
    ("up to the end", True, 3),
    ("of a window", True, None),
    ("of a window", True, 3),
]


def scores(query, key, scale, causal, left):
    """(heads, queries, keys), -inf where the last query at the last key sees nothing."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    found = torch.einsum("snd,tnd->nst", query, key) * scale
    rows, columns = found.shape[1:]
    distance = torch.arange(columns - rows, columns)[:, None] - torch.arange(columns)
    if causal:
        found = found.masked_fill(distance < 0, float("-inf"))
    return found if left is None else found.masked_fill(distance > left, float("-inf"))


def packed_forward(q, k, v, of_queries, of_keys, most_q, most_k, p, causal, mask, **options):
    assert v.shape == k.shape
    output = torch.full(q.shape, torch.nan, dtype=q.dtype)
    sums = torch.full((q.shape[1], q.shape[0]), torch.nan, dtype=q.dtype)
    left = options.get("window_size_left")
    for (a, b), (c, d) in zip(pairs(of_queries), pairs(of_keys), strict=True):
        assert b - a <= most_q
        assert d - c <= most_k
        if a == b or c == d:
            continue
        found = scores(q[a:b], k[c:d], options["scale"], causal, left)
        value = v[c:d].repeat_interleave(q.shape[1] // v.shape[1], dim=1)
        output[a:b] = torch.einsum("nst,tnd->snd", found.softmax(-1), value)
        sums[:, a:b] = found.logsumexp(-1)
    return output, sums, None, None, None


def packed_backward(
    g, q, k, v, o, sums, of_queries, of_keys, most_q, most_k, p, causal, seed, offset, **options
):
    grads = [torch.full_like(each, torch.nan) for each in (q, k, v)]
    groups, left = q.shape[1] // k.shape[1], options.get("window_size_left")
    for (a, b), (c, d) in zip(pairs(of_queries), pairs(of_keys), strict=True):
        if a == b or c == d:
            continue
        found = scores(q[a:b], k[c:d], options["scale"], causal, left)
        weights = torch.exp(found - sums[:, a:b, None])
        value = v[c:d].repeat_interleave(groups, dim=1)
        delta = (g[a:b] * o[a:b]).sum(-1).mT[..., None]
        of_scores = weights * (torch.einsum("snd,tnd->nst", g[a:b], value) - delta)
        of_scores = of_scores * options["scale"]
        key = k[c:d].repeat_interleave(groups, dim=1)
        grads[0][a:b] = torch.einsum("nst,tnd->snd", of_scores, key)
        of_keys_here = torch.einsum("nst,snd->tnd", of_scores, q[a:b])
        of_values_here = torch.einsum("nst,snd->tnd", weights, g[a:b])
        grads[1][c:d] = of_keys_here.unflatten(1, (-1, groups)).sum(2)
        grads[2][c:d] = of_values_here.unflatten(1, (-1, groups)).sum(2)
    return grads


def pairs(bounds):
    return zip(bounds.tolist()[:-1], bounds.tolist()[1:], strict=True)


def dense(x):
    """(B, heads, S, D) as one document a row."""
    return x.transpose(1, 2).flatten(0, 1)


def rows(length):
    return torch.arange(0, B * length + 1, length)


def dense_forward(q, k, v, p, causal, mask, *, scale):
    bounds = rows(q.shape[2]), rows(k.shape[2])
    flat = [dense(each) for each in (q, k, v)]
    output, sums, *_ = packed_forward(*flat, *bounds, S, S, p, causal, mask, scale=scale)
    output = output.unflatten(0, (B, -1)).transpose(1, 2)
    return output, sums.unflatten(1, (B, -1)).transpose(0, 1)


def dense_backward(
    g, q, k, v, o, sums, none_q, none_k, most_q, most_k, p, causal, seed, offset, *, scale
):
    bounds = rows(q.shape[2]), rows(k.shape[2])
    flat = [dense(each) for each in (g, q, k, v, o)]
    sums = sums.transpose(0, 1).flatten(1)
    grads = packed_backward(
        *flat, sums, *bounds, most_q, most_k, p, causal, seed, offset, scale=scale
    )
    return [each.unflatten(0, (B, -1)).transpose(1, 2) for each in grads]


@pytest.fixture(autouse=True)
def _kernels(monkeypatch):
    kernels = SimpleNamespace(
        _flash_attention_forward=packed_forward,
        _flash_attention_backward=packed_backward,
        _scaled_dot_product_flash_attention=dense_forward,
        _scaled_dot_product_flash_attention_backward=dense_backward,
    )
    monkeypatch.setattr(flash, "_OPS", kernels)


@pytest.mark.parametrize(("name", "packed", "window"), SERVED)
def test_a_block_is_that_of_plain_torch(name, packed, window):
    block, rules = BLOCKS[name], Rules(scale=0.3, window=window, softcap=None)
    generator = torch.Generator().manual_seed(0)
    T = block.keys
    shapes = [(B, 4, N, D), (B, T, K, D), (B, T, K, V), (B, 4, N, V)]
    query, key, value, grad = (torch.randn(each, generator=generator) for each in shapes)
    documents = None
    if packed:
        call = Call(Layout(4, 0, False), None, None, rules)
        documents = Documents.of(torch.empty(B, S // 4, N, D), PACKED, call)
    numbers = None if documents is None else documents.numbers(block)
    expected = attend_block(query, key, value, block, rules, numbers)
    if documents is None:
        found = flash.attend_flash(query, key, value, block, rules)
    else:
        bounds = documents.bounds(block)
        found = flash.attend_packed(query, key, value, bounds, block, rules)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)

    # As if there were other blocks: the final logarithms are larger, the output is another.
    output = torch.randn(expected[0].shape, generator=generator)
    sums = torch.logaddexp(expected[1], torch.tensor(0.5))
    delta = (grad * output).sum(-1)
    expected = block_gradients(query, key, value, grad, delta, sums, block, rules, numbers)
    tensors = (query, key, value, grad, output, sums)
    if documents is None:
        found = flash.flash_gradients(*tensors, block, rules)
    else:
        found = flash.packed_gradients(*tensors, documents.bounds(block), block, rules)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_the_kernels_serve_all_blocks_but_partly_hidden_ones():
    served = [
        (name, packed, window)
        for name, block in BLOCKS.items()
        for packed in (False, True)
        for window in (None, 3)
        if flash.is_flash_block(block, Rules(scale=1.0, window=window, softcap=None), packed=packed)
    ]
    assert served == SERVED
