import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3Attention,
    DeepseekV3RotaryEmbedding,
)

from lme_core.architectures.gpt_base import GPTBaseConfig
from lme_core.generation import generate, left_pad, next_logits
from lme_core.layers.context import SequenceContext
from lme_core.layers.dropout import dropout
from lme_core.layers.rotary import Rotary
from lme_core.mixers.multihead_latent_attention import MultiheadLatentAttentionConfig
from lme_core.mlps.dense import DenseMLPConfig
from lme_kernels.policy import KernelPolicy

N, D, R = 3, 4, 2
BASE = MultiheadLatentAttentionConfig(
    num_attention_heads=N, head_dim=D, query_compression_size=5, key_value_compression_size=6
)
CASES = {
    "seed system": BASE,
    "biases, window": replace(BASE, add_bias=True, sliding_window=3, attention_multiplier=0.3),
    "rope": replace(
        BASE,
        rope_head_dim=R,
        share_compression=True,
        value_head_dim=3,
        normalization_function="rmsnorm",
    ),
    "whole queries": replace(BASE, query_compression_size=None, rope_head_dim=R, add_bias=True),
}
every_case = pytest.mark.parametrize("config", CASES.values(), ids=CASES)


def positions(config):
    return "nope" if config.rope_head_dim is None else "rope"


def norm(config, module, x):
    if config.normalization_function == "rmsnorm":
        return F.rms_norm(x, x.shape, module.weight, 1e-5)
    return F.layer_norm(x, x.shape, module.weight, module.bias, 1e-5)


def rotate(x, position):
    """The R = 2 channels of one head: one pair, one radian a token."""
    cos, sin = math.cos(position), math.sin(position)
    return torch.stack((x[0] * cos - x[1] * sin, x[1] * cos + x[0] * sin))


def loop(mixer, config):
    """The formula, a token and a head at a time; positions count in the document."""
    C, rotary = config.key_value_compression_size, config.rope_head_dim or 0
    V, scale = config.value_size(), config.attention_multiplier or (D + rotary) ** -0.5

    def run(x):
        queries, keys, values, rows = [], [], [], []
        for t in range(len(x)):
            source = x[t]
            if config.query_compression_size is not None:
                source = norm(config, mixer.query_norm, mixer.query_down(source))
            down = mixer.key_value_down(x[t])
            latent = norm(config, mixer.key_value_norm, down[: len(down) - rotary])
            of_keys, of_values = latent[:C], latent[-C:]
            turning = rotate(down[-rotary:], t) if rotary else x.new_zeros(0)
            query = mixer.query_up(source).view(N, D + rotary)
            key = mixer.key_up(of_keys).view(N, D)
            queries.append(
                [torch.cat((q[:D], rotate(q[D:], t) if rotary else q[D:])) for q in query]
            )
            keys.append([torch.cat((k, turning)) for k in key])
            values.append(mixer.value_up(of_values).view(N, V))
            first = 0 if config.sliding_window is None else max(t - config.sliding_window + 1, 0)
            heads = []
            for n in range(N):
                scores = torch.stack([scale * (queries[t][n] @ k[n]) for k in keys[first:]])
                heads.append(scores.softmax(0) @ torch.stack([v[n] for v in values[first:]]))
            rows.append(mixer.output(torch.cat(heads)))
        return torch.stack(rows)

    return run


@every_case
@pytest.mark.parametrize("packed", [False, True])
def test_values_and_gradients_are_those_of_the_formula(
    config, packed, build_mixer, random_input, cu_seqlens
):
    mixer = build_mixer(config, position_embedding_type=positions(config))
    x = random_input().requires_grad_()
    B, S, H = x.shape
    lengths = cu_seqlens.diff().tolist() if packed else [S] * B
    place = torch.cat([torch.arange(length) for length in lengths]).view(B, S)
    rotary = None
    if config.rope_head_dim is not None:
        rotary = Rotary(R, 10000.0).at(place, dtype=torch.float64)
    context = SequenceContext(rotary=rotary, cu_seqlens=cu_seqlens if packed else None)
    ours = mixer(x, context, None)
    run = loop(mixer, config)
    expected = torch.cat([run(each) for each in x.flatten(0, 1).split(lengths)]).view(B, S, H)
    # Rounding in float64 only.
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-11)
    inputs, grad = [x, *mixer.parameters()], random_input(seed=2)
    # The bias of keys moves no score relative to another: its gradient is zero, and rounding.
    got = torch.autograd.grad(ours, inputs, grad)
    for one, other in zip(got, torch.autograd.grad(expected, inputs, grad), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)
    if packed:
        changed = torch.where((torch.arange(B * S) < 11).view(B, S, 1), 7.0, x.detach())
        assert torch.equal(mixer(changed, context, None)[1], ours[1])


@every_case
# Token by token; in pieces; all at once.
@pytest.mark.parametrize("pieces", [[1] * 11, [4, 1, 6], [11]], ids=str)
def test_compressed_attention_over_the_cache_is_expanded_attention(
    config, pieces, build_mixer, random_input
):
    mixer = build_mixer(config, position_embedding_type=positions(config))
    x = random_input()
    rotary = None
    if config.rope_head_dim is not None:
        rotary = Rotary(R, 10000.0).at(torch.arange(11), dtype=torch.float64)
    cache = mixer.new_cache(2, 11, device=x.device, dtype=x.dtype)
    outputs, first = [], 0
    with torch.no_grad():
        for piece in x.split(pieces, 1):
            span = slice(first, first + piece.shape[1])
            its = None if rotary is None else tuple(each[span] for each in rotary)
            outputs.append(mixer(piece, SequenceContext(rotary=its), cache))
            first = span.stop
    expected = mixer(x, SequenceContext(rotary=rotary), None)
    # The products are bracketed differently: rounding in float64.
    torch.testing.assert_close(torch.cat(outputs, 1), expected, rtol=1e-9, atol=1e-11)
    latent = 6 * (1 if config.share_compression else 2) + (config.rope_head_dim or 0)
    assert cache.latent.shape == (2, 11, latent)
    with pytest.raises(ValueError, match="`max_length` = 11 tokens, got 12"):
        mixer(x[:, :1], SequenceContext(), cache)
    before = cache.latent
    cache.reorder(torch.tensor([1, 1]))
    assert torch.equal(cache.latent, before[[1, 1]])


PROMPTS = [[5, 6, 7, 8, 9], [3, 4], [10, 11, 12, 13, 14, 15, 16], [1]]


def decoder(config):
    return GPTBaseConfig(
        vocab_size=41,
        hidden_size=12,
        num_layers=2,
        position_embedding_type=positions(config),
        initializer_range=0.3,
        sequence_mixer_blocks=(config,),
        mlp_blocks=(DenseMLPConfig(intermediate_size=8),),
    ).build(KernelPolicy())


@every_case
def test_padded_prompts_continue_as_each_alone(config):
    model = decoder(config).double()
    ids, valid = left_pad(PROMPTS)
    got = generate(model, ids, valid=valid, max_new_tokens=4, temperature=0)
    padded = next_logits(model, {"input_ids": ids, "valid": valid}, model.new_cache(4, 7))
    for row, prompt, logits in zip(got.tolist(), PROMPTS, padded, strict=True):
        tokens = list(prompt)
        alone = model({"input_ids": torch.tensor([tokens])}).logits[0, -1]
        # Rounding in float64.
        torch.testing.assert_close(logits, alone, rtol=1e-9, atol=1e-10)
        for _ in range(4):
            whole = model({"input_ids": torch.tensor([tokens])}).logits
            tokens.append(int(whole[0, -1].argmax()))
        assert row == tokens[len(prompt) :]


def in_our_layout(theirs, config):
    """Split keys from values, and sort interleaved pairs of rotating rows into halves."""
    turns, C = config.qk_rope_head_dim, config.kv_lora_rank
    pairs = [*range(0, turns, 2), *range(1, turns, 2)]

    def sort(rows, first):
        return torch.cat((rows[..., :first, :], rows[..., first:, :][..., pairs, :]), -2)

    names = {
        "q_a_proj": "query_down",
        "q_a_layernorm": "query_norm",
        "kv_a_layernorm": "key_value_norm",
        "o_proj": "output",
    }
    ours = {
        f"{new}.weight": theirs[f"{old}.weight"]
        for old, new in names.items()
        if f"{old}.weight" in theirs
    }
    up = theirs.get("q_b_proj.weight", theirs.get("q_proj.weight"))
    up = up.unflatten(0, (config.num_attention_heads, -1))
    ours["query_up.weight"] = sort(up, config.qk_nope_head_dim).flatten(0, 1)
    ours["key_value_down.weight"] = sort(theirs["kv_a_proj_with_mqa.weight"], C)
    both = theirs["kv_b_proj.weight"].unflatten(0, (config.num_attention_heads, -1))
    key, value = both.split([config.qk_nope_head_dim, config.v_head_dim], 1)
    return ours | {"key_up.weight": key.flatten(0, 1), "value_up.weight": value.flatten(0, 1)}


# float64 with the other side's casts lifted: rounding. float32 with transformers untouched: a few
# hundred roundings of 6e-8.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize("compressed", [5, None])
def test_values_and_gradients_are_those_of_deepseek(
    compressed, dtype, tolerance, lift_casts, relative, build_mixer, random_input
):
    if dtype == torch.float64:
        lift_casts(dtype)
    config = DeepseekV3Config(
        hidden_size=12,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=compressed,
        kv_lora_rank=6,
        qk_nope_head_dim=4,
        qk_rope_head_dim=4,
        v_head_dim=3,
        rms_norm_eps=1e-6,
        num_hidden_layers=1,
        attn_implementation="eager",
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
    )
    torch.manual_seed(0)
    theirs = DeepseekV3Attention(config, 0).to(dtype)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5)
    its = MultiheadLatentAttentionConfig(
        num_attention_heads=4,
        head_dim=4,
        query_compression_size=compressed,
        key_value_compression_size=6,
        share_compression=True,
        rope_head_dim=4,
        value_head_dim=3,
        normalization_function="rmsnorm",
        # Theirs, whatever the model's.
        normalization_epsilon=1e-6,
    )
    ours = build_mixer(its, dtype=dtype, position_embedding_type="rope", layer_norm_epsilon=1e-3)
    ours.load_state_dict(in_our_layout(theirs.state_dict(), config))
    S = 15
    x, grad = (random_input(2, S, seed=seed, dtype=dtype) for seed in (1, 2))
    hidden = torch.ones(S, S, dtype=torch.bool).triu(1)
    mask = torch.zeros(1, 1, S, S, dtype=dtype).masked_fill(hidden, torch.finfo(dtype).min)
    expected = theirs(x, DeepseekV3RotaryEmbedding(config)(x, torch.arange(S)[None]), mask)[0]
    rotary = Rotary(4, 100.0).table(S, device=x.device, dtype=dtype)
    got = ours(x, SequenceContext(rotary=rotary), None)
    assert relative(got, expected) < tolerance
    expected.backward(grad)
    got.backward(grad)
    gradients = in_our_layout({name: p.grad for name, p in theirs.named_parameters()}, config)
    for name, parameter in ours.named_parameters():
        assert relative(parameter.grad, gradients[name]) < tolerance, name


def test_shapes_are_those_of_the_seed_system(build_mixer):
    mixer = build_mixer(replace(BASE, add_bias=True))
    assert {name: tuple(p.shape) for name, p in mixer.named_parameters()} == {
        "query_down.weight": (5, 12),
        "query_down.bias": (5,),
        "query_norm.weight": (5,),
        "query_norm.bias": (5,),
        "query_up.weight": (12, 5),
        "query_up.bias": (12,),
        "key_value_down.weight": (12, 12),
        "key_value_down.bias": (12,),
        "key_value_norm.weight": (12,),
        "key_value_norm.bias": (12,),
        "key_up.weight": (12, 6),
        "key_up.bias": (12,),
        "value_up.weight": (12, 6),
        "value_up.bias": (12,),
        "output.weight": (12, 12),
        "output.bias": (12,),
    }


@every_case
def test_flops_are_those_of_the_products(config, build_mixer):
    mixer = build_mixer(config, position_embedding_type=positions(config))
    settings = decoder(config).config
    linear = sum(m.weight.numel() for m in mixer.modules() if isinstance(m, torch.nn.Linear))
    seen = sum(min(t + 1, config.sliding_window or 9) for t in range(9)) / 9
    pairs = N * (D + (config.rope_head_dim or 0) + config.value_size())
    assert config.forward_flops(settings, 9) == pytest.approx(2 * linear + 2 * pairs * seen)


def test_dropouts_are_functions_of_the_key(build_mixer, random_input):
    x = random_input()
    index = torch.arange(x.shape[0] * x.shape[1]).view(x.shape[:2])
    training = SequenceContext(dropout_key=torch.tensor(5), token_index=index)
    mixer = build_mixer(replace(BASE, dropout=0.5))
    plain = mixer(x, SequenceContext(), None)
    assert torch.equal(mixer(x, training, None), dropout(plain, 0.5, torch.tensor(5), 0, index))
    mixer = build_mixer(replace(BASE, softmax_dropout=0.3))
    dropped = mixer(x, training, None)
    assert torch.equal(dropped, mixer(x, training, None))
    assert not torch.allclose(dropped, plain)
    # A row's masks are those of its tokens, wherever the row is.
    alone = SequenceContext(dropout_key=torch.tensor(5), token_index=index[1:])
    torch.testing.assert_close(mixer(x[1:], alone, None), dropped[1:], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("packed", [False, True])
def test_alike_layers_compile_whole_and_once(packed, build_mixer, random_input, cu_seqlens):
    torch.compiler.reset()
    config = CASES["rope"]
    layers = [build_mixer(config, position_embedding_type="rope") for _ in range(2)]
    x = random_input().requires_grad_()
    rotary = Rotary(R, 10000.0).table(11, device=x.device, dtype=x.dtype)
    context = SequenceContext(rotary=rotary, cu_seqlens=cu_seqlens if packed else None)

    def run():
        y = layers[1](layers[0](x, context, None), context, None)
        return y, torch.autograd.grad(y.square().sum(), x)[0]

    expected = run()
    for layer in layers:
        layer.compile(fullgraph=True, backend="aot_eager", dynamic=False)
    with torch._dynamo.config.patch(error_on_recompile=True):
        got = run()
    # The compiler may split an operation into others: rounding in float64.
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"head_dim": 0}, "`head_dim` must be at least 1, got 0"),
        ({"query_compression_size": 0}, "`query_compression_size` must be at least 1"),
        ({"normalization_epsilon": 0.0}, "`normalization_epsilon` must be above 0"),
        ({"dropout": 1.0}, "`dropout` must be at least 0 and below 1"),
    ],
    ids=str,
)
def test_a_wrong_setting_is_refused_by_name(fields, message):
    with pytest.raises(ValueError, match=message):
        replace(BASE, **fields)


@pytest.mark.parametrize(("kind", "size"), [("rope", None), ("nope", 2)])
def test_rotating_channels_go_with_rope(kind, size, build_mixer):
    with pytest.raises(
        ValueError, match="`rope_head_dim` goes with `position_embedding_type: rope`"
    ):
        build_mixer(replace(BASE, rope_head_dim=size), position_embedding_type=kind)
