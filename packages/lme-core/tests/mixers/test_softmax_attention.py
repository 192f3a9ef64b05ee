import math

import pytest
import torch
from torch.nn import functional as F

from lme_core.architectures.gpt_base import GPTBaseConfig
from lme_core.layers import random
from lme_core.layers.context import SequenceContext
from lme_core.layers.dropout import dropout
from lme_core.layers.rotary import Rotary
from lme_core.mixers.softmax_attention import SoftmaxAttentionConfig
from lme_kernels.policy import KernelPolicy

H, B, S = 24, 2, 8
CU_SEQLENS = [0, 3, 8, 9, 16]


def build(settings=None, **fields):
    fields = {"num_attention_heads": 4, "num_key_value_heads": 2} | fields
    config = SoftmaxAttentionConfig(**fields)
    settings = GPTBaseConfig(hidden_size=H, sequence_mixer_blocks=(config,), **(settings or {}))
    mixer = config.build(settings, 0, KernelPolicy()).double()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5)
    return config, settings, mixer


def rotate(x, position, frequencies, first):
    """Rotate one head's channels, pair by pair."""
    R, out = 2 * len(frequencies), x.clone()
    offset = 0 if first else len(x) - R
    for j, frequency in enumerate(frequencies):
        a, b = offset + j, offset + j + len(frequencies)
        cos, sin = math.cos(position * frequency), math.sin(position * frequency)
        out[a] = x[a] * cos - x[b] * sin
        out[b] = x[b] * cos + x[a] * sin
    return out


def heads_of(config, mixer, x):
    """Cut the projection's rows head by head: for each key head [queries, key, value, gates]."""
    D, K = config.head_size(H), config.num_key_value_heads
    G = config.num_attention_heads // K
    rows = iter(F.linear(x, mixer.qkv.weight, mixer.qkv.bias).split(D))
    query, key, value, gate = [], [], [], []
    for _ in range(K):
        query += [next(rows) for _ in range(G)]
        key.append(next(rows))
        value.append(next(rows))
        gate += [next(rows) for _ in range(G)] if config.attention_gate else []
    return query, key, value, gate


def reference(config, settings, mixer, x, documents):
    """The formula, a token and a head at a time."""
    D, K = config.head_size(H), config.num_key_value_heads
    G, N = config.num_attention_heads // K, config.num_attention_heads
    dim = settings.rope_dim or D
    theta = 10000.0
    frequencies = [theta ** (-2 * j / dim) for j in range(dim // 2)]
    scale = config.attention_multiplier or (
        1 / D if config.attention_multiplier_method == "1 / head_dim" else 1 / math.sqrt(D)
    )
    rows = []
    for b in range(B):
        tokens = [heads_of(config, mixer, x[b, s]) for s in range(S)]

        def placed(head, s, norm):
            if config.qk_norm:
                head = F.rms_norm(head, (D,), norm.weight, settings.layer_norm_epsilon)
            if settings.position_embedding_type != "rope":
                return head
            return rotate(head, s, frequencies, settings.rope_channels == "first")

        for s in range(S):
            query, _, value, gate = tokens[s]
            first = 0 if config.sliding_window is None else s - config.sliding_window + 1
            seen = [
                t
                for t in range(max(first, 0), s + 1)
                if documents is None or documents[b][t] == documents[b][s]
            ]
            outputs = []
            for n in range(N):
                q = placed(query[n], s, mixer.query_norm)
                keys = [placed(tokens[t][1][n // G], t, mixer.key_norm) for t in seen]
                scores = torch.stack([scale * (q @ k) for k in keys])
                if config.attention_softcap is not None:
                    cap = config.attention_softcap
                    scores = cap * torch.tanh(scores / cap)
                values = torch.stack([tokens[t][2][n // G] for t in seen])
                share = scores.exp().sum()
                if config.attention_sinks:
                    share = share + mixer.sinks.weight[n].exp()
                o = (scores.exp() / share) @ values
                if config.exclusive_self_attention:
                    v = value[n // G]
                    o = o - (o @ v) / (v @ v) * v
                outputs.append(o * torch.sigmoid(gate[n]) if gate else o)
            rows.append(F.linear(torch.cat(outputs), mixer.output.weight, mixer.output.bias))
    return torch.stack(rows).view(B, S, H)


CASES = {
    "grouped": {},
    "multi-head": {"num_key_value_heads": 4},
    "multi-query": {"num_key_value_heads": 1},
    "biases": {"add_bias": True},
    "qkv bias only": {"qkv_bias": True},
    "no qkv bias": {"add_bias": True, "qkv_bias": False},
    "wide heads": {"head_dim": 10},
    "multiplier": {"attention_multiplier": 0.3},
    "1 / head_dim": {"attention_multiplier_method": "1 / head_dim"},
    "gate": {"attention_gate": True},
    "exclusive": {"exclusive_self_attention": True},
    "qk norm": {"qk_norm": True},
    "window": {"sliding_window": 3},
    "window of one": {"sliding_window": 1},
    "softcap": {"attention_softcap": 0.7},
    "sinks": {"attention_sinks": True},
    "all": {
        "add_bias": True,
        "attention_gate": True,
        "exclusive_self_attention": True,
        "qk_norm": True,
        "sliding_window": 4,
        "head_dim": 8,
        "attention_softcap": 2.0,
        "attention_sinks": True,
    },
}
POSITIONS = {
    "rope": {},
    "partial rope, last": {"rope_dim": 4},
    "partial rope, first": {"rope_dim": 4, "rope_channels": "first"},
    "none": {"position_embedding_type": "nope"},
}


def compare(fields, settings, packed):
    config, settings, mixer = build(settings, **fields)
    x = torch.randn(B, S, H, dtype=torch.float64, requires_grad=True)
    rotary = None
    if settings.position_embedding_type == "rope":
        table = Rotary(settings.rope_dim or config.head_size(H), 10000.0)
        rotary = table.table(S, device=x.device, dtype=torch.float64)
    documents = None
    if packed:
        bounds = torch.tensor(CU_SEQLENS[1:])
        documents = torch.bucketize(torch.arange(B * S), bounds, right=True).view(B, S)
    cu_seqlens = torch.tensor(CU_SEQLENS, dtype=torch.int32) if packed else None
    ours = mixer(x, SequenceContext(rotary=rotary, cu_seqlens=cu_seqlens), None)
    expected = reference(config, settings, mixer, x, documents)
    # Rounding in float64 only.
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)
    inputs = [x, *mixer.parameters()]
    grad = torch.randn_like(x)
    got = torch.autograd.grad(ours, inputs, grad)
    for ours_grad, its_grad in zip(got, torch.autograd.grad(expected, inputs, grad), strict=True):
        torch.testing.assert_close(ours_grad, its_grad, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("fields", CASES.values(), ids=CASES)
def test_values_and_gradients_match_the_formula(fields):
    compare(fields, None, packed=False)


@pytest.mark.parametrize("settings", POSITIONS.values(), ids=POSITIONS)
@pytest.mark.parametrize("name", ["grouped", "qk norm"])
def test_positions_match_the_formula(name, settings):
    compare(CASES[name], settings, packed=False)


@pytest.mark.parametrize("name", ["grouped", "window", "all"])
def test_packed_documents_do_not_see_each_other(name):
    compare(CASES[name], None, packed=True)


# Golden order of the seed system, for 4 heads, 2 of keys and values, 2 channels each.
def test_rows_go_by_key_head():
    _, _, mixer = build({"position_embedding_type": "nope"}, head_dim=2)
    order = [100, 101, 102, 103, 200, 201, 300, 301, 104, 105, 106, 107, 202, 203, 302, 303]
    with torch.no_grad():
        mixer.qkv.weight.zero_()
        mixer.qkv.weight[:, 0] = torch.tensor(order)
    seen = {}

    def attend(query, key, value, **options):
        seen.update(query=query, key=key, value=value)
        return query

    mixer.attend = attend
    x = torch.zeros(1, 1, H, dtype=torch.float64)
    x[..., 0] = 1
    mixer(x, SequenceContext(), None)
    assert seen["query"].flatten().tolist() == [100, 101, 102, 103, 104, 105, 106, 107]
    assert seen["key"].flatten().tolist() == [200, 201, 202, 203]
    assert seen["value"].flatten().tolist() == [300, 301, 302, 303]


def test_shapes_and_traits_are_those_of_the_seed_system():
    fields = {"add_bias": True, "attention_gate": True, "qk_norm": True}
    config = SoftmaxAttentionConfig(num_attention_heads=4, num_key_value_heads=2, **fields)
    mixer = config.build(GPTBaseConfig(hidden_size=48), 0, KernelPolicy())
    assert {name: tuple(p.shape) for name, p in mixer.named_parameters()} == {
        "qkv.weight": (144, 48),
        "qkv.bias": (144,),
        "output.weight": (48, 48),
        "output.bias": (48,),
        "query_norm.weight": (12,),
        "key_norm.weight": (12,),
    }
    for linear in (mixer.qkv, mixer.output):
        specs = linear.parameter_specs()
        assert specs["weight"].mup
        assert specs["weight"].weight_decay
        assert not specs["bias"].weight_decay
    assert not mixer.query_norm.parameter_specs()["weight"].weight_decay


def training_context():
    return SequenceContext(dropout_key=torch.tensor(5), token_index=torch.arange(B * S).view(B, S))


def test_dropout_is_applied_to_the_output():
    _, _, mixer = build({"position_embedding_type": "nope"}, dropout=0.5)
    x = torch.randn(B, S, H, dtype=torch.float64)
    context = training_context()
    plain = mixer(x, SequenceContext(), None)
    expected = dropout(plain, 0.5, context.dropout_key, 0, context.token_index)
    assert torch.equal(mixer(x, context, None), expected)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"sliding_window": 4},
        {"attention_softcap": 0.7, "attention_sinks": True, "sliding_window": 4},
    ],
    ids=str,
)
@pytest.mark.parametrize("packed", [False, True])
def test_softmax_dropout_drops_weights_by_query_head_and_key(fields, packed):
    nope = {"position_embedding_type": "nope"}
    _, _, mixer = build(nope, softmax_dropout=0.3, **fields)
    _, _, plain = build(nope, **fields)
    x = torch.randn(B, S, H, dtype=torch.float64)
    context = training_context()
    cu_seqlens = torch.tensor(CU_SEQLENS, dtype=torch.int32) if packed else None
    context = SequenceContext(
        dropout_key=context.dropout_key, token_index=context.token_index, cu_seqlens=cu_seqlens
    )
    seen = {}

    def attend(query, key, value, **options):
        # Weights out of the op itself, one unit value at a time.
        unit = torch.eye(S, dtype=query.dtype).expand(B, S, S)[:, :, None].expand(B, S, 2, S)
        weights = inner(query, key, unit, **options)
        key_of_token = random.mix(random.mix(context.dropout_key, 2), context.token_index)
        columns = torch.arange(4)[:, None] * 2**32 + torch.arange(S)
        keep = random.uniform(key_of_token[:, :, None, None] ^ columns, 1) >= 0.3
        dropped = torch.where(keep, weights / 0.7, 0.0)
        seen["share"] = ((dropped == 0) & (weights > 0)).sum() / (weights > 0).sum()
        return torch.einsum("bsnt,btnd->bsnd", dropped, value.repeat_interleave(2, 2))

    inner, plain.attend = plain.attend, attend
    expected = plain(x, SequenceContext(cu_seqlens=cu_seqlens), None)
    # Rounding in float64 only.
    torch.testing.assert_close(mixer(x, context, None), expected, rtol=1e-10, atol=1e-12)
    assert 0.15 < seen["share"] < 0.45
    # In evaluation nothing drops.
    evaluation = SequenceContext(cu_seqlens=cu_seqlens)
    assert not torch.equal(mixer(x, evaluation, None), mixer(x, context, None))


def test_softmax_dropout_says_that_it_is_explicit(caplog):
    build(softmax_dropout=0.1)
    assert "softmax_dropout=0.1" in caplog.text
    assert "explicit" in caplog.text


def test_a_full_cache_is_refused_by_name():
    _, _, mixer = build({"position_embedding_type": "nope"})
    cache = mixer.new_cache(B, 4, device=torch.device("cpu"), dtype=torch.float64)
    with pytest.raises(ValueError, match="`max_length` = 4 tokens, got 5"):
        mixer(torch.zeros(B, 5, H, dtype=torch.float64), SequenceContext(), cache)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_attention_heads": 6, "num_key_value_heads": 4}, "multiple of `num_key_value_heads`"),
        ({"num_key_value_heads": 0}, "`num_key_value_heads` must be at least 1, got 0"),
        ({"head_dim": 0}, "`head_dim` must be at least 1"),
        ({"sliding_window": 0}, "`sliding_window` must be at least 1"),
        ({"attention_softcap": 0.0}, "`attention_softcap` must be above 0, got 0.0"),
        ({"softmax_dropout": -0.1}, "`softmax_dropout` must be at least 0"),
        (
            {"attention_multiplier": 1.0, "attention_multiplier_method": "1 / head_dim"},
            "exclude each other",
        ),
    ],
    ids=str,
)
def test_a_wrong_setting_is_refused_by_name(fields, message):
    with pytest.raises(ValueError, match=message):
        SoftmaxAttentionConfig(**fields)
