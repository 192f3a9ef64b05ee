"""Norms elsewhere, blocks without an MLP, bounded logits, bases of rotation by layer."""

import pytest
import torch
from torch.nn import functional as F

from lme_core.config import from_dict, to_dict
from lme_core.flops import flops_per_token
from lme_core.generation import left_pad, next_logits
from lme_core.layers.normalization import build_norm
from lme_kernels.policy import KernelPolicy

B, S, V, H, N, K, D = 2, 11, 41, 24, 4, 2, 6
ATTENTION = {
    "sequence_mixer_type": "softmax_attention",
    "num_attention_heads": N,
    "num_key_value_heads": K,
}
MAMBA = {"sequence_mixer_type": "mamba2", "state_size": 4, "num_heads": 4, "num_groups": 2}
MLP = {"mlp_type": "MLP", "activation_function": "swiglu", "intermediate_size": 20}
NONE = {"mlp_type": "none"}
BASE = {
    "vocab_size": V,
    "hidden_size": H,
    "num_layers": 2,
    "initializer_range": 0.3,
    "m_residual": 0.7,
    "sequence_mixer_blocks": [ATTENTION],
    "mlp_blocks": [MLP],
}
CASES = {
    "post": {"norm_placement": "post"},
    "sandwich": {"norm_placement": "sandwich"},
    "zero-centred": {"zero_centered_norms": True},
    "all": {"norm_placement": "sandwich", "zero_centered_norms": True, "logit_softcap": 2.0},
    "layernorm": {"norm_placement": "sandwich", "normalization_function": "layernorm"},
    "no MLP": {"mlp_blocks": [NONE, MLP]},
    "no MLP, sandwich": {"mlp_blocks": [MLP, NONE], "norm_placement": "sandwich"},
    "no MLP, post": {"mlp_blocks": [NONE], "norm_placement": "post"},
    "bounded": {"logit_softcap": 1.5, "m_width": 3.0},
    "bases": {"sequence_mixer_blocks": [ATTENTION | {"rope_theta": 50.0}, ATTENTION]},
    "norm across heads": {
        "sequence_mixer_blocks": [ATTENTION | {"qk_norm": True, "qk_norm_across_heads": True}]
    },
    "head norms, zero-centred": {
        "sequence_mixer_blocks": [ATTENTION | {"qk_norm": True}],
        "zero_centered_norms": True,
    },
}


def build(fields):
    torch.manual_seed(0)
    model = from_dict(BASE | fields).build(KernelPolicy()).double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def batch_of(rows=B, length=S):
    ids = torch.randint(0, V, (rows, length), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids.roll(-1, 1)}


def formula(model, ids):
    """The decoder from its parameters, in plain torch."""
    config, values = model.config, dict(model.named_parameters())
    offset = 1.0 if config.zero_centered_norms else 0.0

    def norm(name, x):
        if f"{name}.weight" not in values:
            return x
        weight = values[f"{name}.weight"] + offset
        if config.normalization_function == "layernorm":
            return F.layer_norm(x, (H,), weight, values[f"{name}.bias"], 1e-5)
        return F.rms_norm(x, weight.shape, weight, 1e-5)

    def turned(x, theta):
        angles = torch.arange(S)[:, None] * theta ** (-torch.arange(0, D, 2).double() / D)
        cos, sin = (f(torch.cat((angles, angles), -1)) for f in (torch.cos, torch.sin))
        left, right = x.chunk(2, -1)
        return x * cos + torch.cat((-right, left), -1) * sin

    def attention(mixer, name, x):
        rows = F.linear(x, values[f"{name}.qkv.weight"]).unflatten(-1, (K, N // K + 2, D))
        query, key, value = (
            rows[..., :-2, :].flatten(2),
            rows[..., -2, :].flatten(2),
            rows[..., -1, :],
        )
        if mixer.qk_norm and not mixer.qk_norm_across_heads:
            query, key = query.unflatten(-1, (N, D)), key.unflatten(-1, (K, D))
        query, key = norm(f"{name}.query_norm", query), norm(f"{name}.key_norm", key)
        query, key = (each.reshape(*x.shape[:2], -1, D).transpose(1, 2) for each in (query, key))
        theta = mixer.rope_theta or config.rope_theta
        key, value = (
            each.repeat_interleave(N // K, 1)
            for each in (turned(key, theta), value.transpose(1, 2))
        )
        scores = turned(query, theta) @ key.transpose(-1, -2) / D**0.5
        scores = scores.masked_fill(torch.ones(S, S).triu(1).bool(), float("-inf"))
        mixed = (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
        return F.linear(mixed, values[f"{name}.output.weight"])

    def mlp(name, x):
        both = F.linear(x, values[f"{name}.gate_up.weight"])
        return F.linear(F.silu(both[..., 0::2]) * both[..., 1::2], values[f"{name}.down.weight"])

    x = values["embedding.weight"][ids]
    for layer, mixer in enumerate(config.mixers()):
        at = f"blocks.{layer}"
        y = attention(mixer, f"{at}.sequence_mixer", norm(f"{at}.mixer_norm", x))
        x = x + 0.7 * norm(f"{at}.mixer_output_norm", y)
        if f"{at}.mlp.down.weight" in values:
            y = mlp(f"{at}.mlp", norm(f"{at}.mlp_norm", x))
            x = x + 0.7 * norm(f"{at}.mlp_output_norm", y)
    logits = F.linear(norm("final_norm", x), values["lm_head.weight"]) / (config.m_width or 1.0)
    bound = config.logit_softcap
    return logits if bound is None else bound * torch.tanh(logits / bound)


@pytest.mark.parametrize("fields", CASES.values(), ids=CASES)
def test_logits_loss_and_gradients_match_the_formula(fields):
    model, batch = build(fields), batch_of()
    expected = formula(model, batch["input_ids"])
    # Rounding in float64 only.
    torch.testing.assert_close(model(batch).logits, expected, rtol=1e-10, atol=1e-12)
    loss = F.cross_entropy(expected.flatten(0, 1), batch["labels"].flatten(), reduction="sum")
    nll = model(batch, logits=False).nll_sum
    torch.testing.assert_close(nll, loss, rtol=1e-11, atol=0)
    parameters = list(model.parameters())
    wanted = torch.autograd.grad(loss, parameters)
    for got, its in zip(torch.autograd.grad(nll, parameters), wanted, strict=True):
        torch.testing.assert_close(got, its, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("fields", CASES.values(), ids=CASES)
def test_padded_prompts_in_a_cache_give_what_they_give_alone(fields):
    model = build(fields).eval()
    prompts = [[5, 6, 7], [3, 4, 8, 9, 10]]
    alone = [model({"input_ids": torch.tensor([each])}).logits[0, -1] for each in prompts]
    ids, valid = left_pad(prompts)
    got = next_logits(model, {"input_ids": ids, "valid": valid}, model.new_cache(2, 5))
    torch.testing.assert_close(got, torch.stack(alone), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("fields", CASES.values(), ids=CASES)
def test_configs_survive_a_file(fields):
    config = from_dict(BASE | fields)
    assert from_dict(to_dict(config)) == config


@pytest.mark.parametrize("name", ["all", "no MLP, post", "bases", "norm across heads"])
def test_blocks_compile_whole(name):
    torch.compiler.reset()
    model, batch = build(CASES[name]), batch_of()
    expected = model(batch).logits
    for block in model.blocks.values():
        block.compile(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(model(batch).logits, expected, rtol=1e-10, atol=1e-12)


def test_given_positions_turn_layers_with_their_own_base_too():
    model, batch = build(CASES["bases"]), batch_of()
    positions = torch.arange(S).expand(B, S)
    got = model(batch | {"position_ids": positions}).logits
    torch.testing.assert_close(got, model(batch).logits, rtol=1e-12, atol=1e-12)
    # Apart from each other: relative positions are all that counts.
    moved = model(batch | {"position_ids": positions + 100}).logits
    torch.testing.assert_close(moved, got, rtol=1e-8, atol=1e-9)


def test_zero_centred_norms_start_as_the_identity_and_keep_small_distances():
    config = from_dict(BASE | {"zero_centered_norms": True})
    norm = build_norm(config, H, KernelPolicy())
    weight = norm.parameter_specs()["weight"]
    assert not weight.weight_decay
    assert torch.equal(config.build(KernelPolicy()).blocks["0"].mlp_norm.weight, torch.zeros(H))
    norm = norm.bfloat16()
    # A bfloat16 of 1 + 1e-3 is 1.
    with torch.no_grad():
        norm.weight.fill_(1e-3)
    assert norm.factors().dtype == torch.float32
    assert (norm.factors() > 1.0005).all()
    assert norm(torch.ones(1, H, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("position", ["rope", "nope"])
def test_layers_that_know_the_order_need_no_rotation(position):
    mixers = {"position_embedding_type": position, "sequence_mixer_blocks": [MAMBA]}
    config = from_dict(BASE | mixers)
    assert config.rotary_dim() is None
    logits = config.build(KernelPolicy())(batch_of()).logits
    assert logits.isfinite().all()
    both = from_dict(BASE | {"sequence_mixer_blocks": [MAMBA, ATTENTION]})
    assert both.rotary_dim() == D


def test_a_block_without_an_mlp_costs_its_mixer_alone():
    alone, full = (from_dict(BASE | {"mlp_blocks": [each]}) for each in (NONE, MLP))
    difference = flops_per_token(full, S) - flops_per_token(alone, S)
    assert difference == pytest.approx(3 * 2 * (6 * H * 20))
    names = [name for name, _ in alone.build(KernelPolicy()).named_parameters()]
    assert not any("mlp" in name for name in names)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"norm_placement": "middle"}, "norm_placement"),
        ({"logit_softcap": 0.0}, "`logit_softcap` must be above 0"),
        ({"model_type": "palm", "mlp_blocks": [NONE]}, r"`mlp_blocks\[0\].mlp_type`.*gpt_base"),
        ({"model_type": "palm", "norm_placement": "post"}, "norm_placement"),
        (
            {"sequence_mixer_blocks": [ATTENTION | {"qk_norm_across_heads": True}]},
            "`qk_norm_across_heads` says how `qk_norm` is done",
        ),
        ({"sequence_mixer_blocks": [ATTENTION | {"rope_theta": -1.0}]}, "`rope_theta` must be"),
        (
            {
                "sequence_mixer_blocks": [
                    ATTENTION
                    | {"qk_norm": True, "qk_norm_across_heads": True, "attention_sinks": True}
                ]
            },
            "exclude each other",
        ),
        (
            {
                "model_type": "gpt_crosslayer",
                "sequence_mixer_blocks": [ATTENTION | {"rope_theta": 5.0}],
            },
            "rope_theta` is 5.0, which layers that may share keys cannot have",
        ),
    ],
    ids=str,
)
def test_what_is_wrong_is_named(fields, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        from_dict(BASE | fields)
