"""Attention with sinks, a softcap and windows against transformers' layers of the same weights."""

import pytest
import torch
from transformers import Gemma2Config, GptOssConfig
from transformers.models.gemma2.modeling_gemma2 import Gemma2Attention, Gemma2RotaryEmbedding
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssAttention, GptOssRotaryEmbedding

from lme_core.layers.context import SequenceContext
from lme_core.layers.rotary import Rotary
from lme_core.mixers.softmax_attention import SoftmaxAttentionConfig

H, N, K, D, S, WINDOW = 12, 4, 2, 8, 17, 5
SIZES = {
    "hidden_size": H,
    "num_attention_heads": N,
    "num_key_value_heads": K,
    "head_dim": D,
    "num_hidden_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": WINDOW,
    "attn_implementation": "eager",
}
FIELDS = {"num_attention_heads": N, "num_key_value_heads": K, "head_dim": D}


def gpt_oss():
    config = GptOssConfig(**SIZES, rope_parameters={"rope_type": "default", "rope_theta": 100.0})
    fields = FIELDS | {"add_bias": True, "attention_sinks": True}
    return config, GptOssAttention, GptOssRotaryEmbedding, fields


def gemma2():
    config = Gemma2Config(
        **SIZES,
        attn_logit_softcapping=0.8,
        query_pre_attn_scalar=5,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
    )
    fields = FIELDS | {"attention_softcap": 0.8, "attention_multiplier": 5**-0.5}
    return config, Gemma2Attention, Gemma2RotaryEmbedding, fields


def in_our_layout(theirs):
    ours = {}
    for kind in ("weight", "bias"):
        if f"q_proj.{kind}" in theirs:
            heads = [theirs[f"{x}_proj.{kind}"].unflatten(0, (K, -1)) for x in "qkv"]
            ours[f"qkv.{kind}"] = torch.cat(heads, 1).flatten(0, 1)
        if f"o_proj.{kind}" in theirs:
            ours[f"output.{kind}"] = theirs[f"o_proj.{kind}"]
    if "sinks" in theirs:
        ours["sinks.weight"] = theirs["sinks"]
    return ours


# float64 with the other side's casts lifted: rounding. float32 with transformers untouched: a few
# hundred roundings of 6e-8.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize("layer", [0, 1], ids=["window", "all"])
@pytest.mark.parametrize("family", [gpt_oss, gemma2], ids=lambda family: family.__name__)
def test_values_and_gradients_are_those_of_transformers(
    family, layer, dtype, tolerance, lift_casts, relative, build_mixer, random_input
):
    if dtype == torch.float64:
        lift_casts(dtype)
    config, kind, rotary, fields = family()
    torch.manual_seed(0)
    theirs = kind(config, layer).to(dtype)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.4)
    if layer == 0:
        fields["sliding_window"] = WINDOW
    ours = build_mixer(SoftmaxAttentionConfig(**fields), dtype=dtype)
    ours.load_state_dict(in_our_layout(theirs.state_dict()))
    x, grad = (random_input(2, S, seed=seed, dtype=dtype) for seed in (1, 2))
    distance = torch.arange(S)[:, None] - torch.arange(S)
    seen = (distance >= 0) & (distance < (WINDOW if layer == 0 else S))
    mask = torch.zeros(1, 1, S, S, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
    expected = theirs(x, rotary(config)(x, torch.arange(S)[None]), mask)[0]
    table = Rotary(D, 100.0).table(S, device=x.device, dtype=dtype)
    got = ours(x, SequenceContext(rotary=table), None)
    assert relative(got, expected) < tolerance
    expected.backward(grad)
    got.backward(grad)
    gradients = in_our_layout({name: p.grad for name, p in theirs.named_parameters()})
    for name, parameter in ours.named_parameters():
        assert relative(parameter.grad, gradients[name]) < tolerance, name
