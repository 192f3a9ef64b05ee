"""Logits, loss and gradients of random small models against transformers."""

from contextlib import contextmanager

import pytest
import torch
from torch.nn import functional as F
from transformers import GraniteConfig, GraniteForCausalLM, LlamaConfig, LlamaForCausalLM

from lme_core.config import from_dict
from lme_core.generation import left_pad, next_logits
from lme_kernels.policy import KernelPolicy

B, S, V, H, INTERMEDIATE, LAYERS = 2, 19, 71, 32, 48, 2
SIZES = {
    "vocab_size": V,
    "hidden_size": H,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": LAYERS,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attn_implementation": "sdpa",
    "rms_norm_eps": 1e-4,
    "initializer_range": 0.2,
}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
LLAMA = {
    "grouped, untied": {"num_attention_heads": 4, "num_key_value_heads": 2},
    "multi-head, tied": {
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "tie_word_embeddings": True,
    },
    "multi-query, biases": {
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "wide heads": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12},
    "llama3 scaling": {
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 100.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    },
    "yarn scaling": {
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 100.0,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    },
    "linear scaling": {
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 4.0},
    },
}
GRANITE = {
    "multipliers": {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "embedding_multiplier": 12.0,
        "residual_multiplier": 0.22,
        "logits_scaling": 8.0,
        "attention_multiplier": 0.0156,
    },
    "tied, biases": {
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.5,
        "logits_scaling": 2.0,
        "attention_multiplier": 0.3,
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
    },
}
CASES = [
    *(pytest.param("llama", fields, id=f"llama, {name}") for name, fields in LLAMA.items()),
    *(pytest.param("granite", fields, id=f"granite, {name}") for name, fields in GRANITE.items()),
]


@contextmanager
def casts_lifted(dtype):
    """Make transformers' own casts to float32 casts to `dtype`."""
    names = {"float32": torch.float32, "float": torch.float}
    try:
        for name in names:
            setattr(torch, name, dtype)
        yield
    finally:
        for name, value in names.items():
            setattr(torch, name, value)


def their_model(family, fields, dtype):
    kinds = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "granite": (GraniteConfig, GraniteForCausalLM),
    }
    config_class, model_class = kinds[family]
    config = config_class(**{"rope_parameters": ROPE, **SIZES, **fields})
    torch.manual_seed(0)
    model = model_class(config).to(dtype).train()
    with torch.no_grad():
        # Norms and biases start at one and zero, which would hide a mistake.
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return config, model


def our_model(config, dtype):
    rope = dict(config.rope_parameters)
    theta = rope.pop("rope_theta")
    granite = config.model_type == "granite"
    model = from_dict(
        {
            "model_type": "gpt_base",
            "vocab_size": V,
            "hidden_size": H,
            "num_layers": LAYERS,
            "max_position_embeddings": 64,
            "layer_norm_epsilon": config.rms_norm_eps,
            "rope_theta": theta,
            "rope_scaling": rope,
            "tie_word_embeddings": config.tie_word_embeddings,
            "m_emb": config.embedding_multiplier if granite else None,
            "m_residual": config.residual_multiplier if granite else None,
            "m_width": config.logits_scaling if granite else None,
            "sequence_mixer_blocks": [
                {
                    "sequence_mixer_type": "softmax_attention",
                    "num_attention_heads": config.num_attention_heads,
                    "num_key_value_heads": config.num_key_value_heads,
                    "head_dim": None if granite else config.head_dim,
                    "add_bias": config.attention_bias,
                    "attention_multiplier": config.attention_multiplier if granite else None,
                }
            ],
            "mlp_blocks": [
                {
                    "mlp_type": "MLP",
                    "activation_function": "swiglu",
                    "intermediate_size": INTERMEDIATE,
                    "add_bias": config.mlp_bias,
                }
            ],
        }
    ).build(KernelPolicy())
    return model.to(dtype)


def in_our_layout(config, theirs):
    """Rename tensors and gather those that we keep in one."""
    K = config.num_key_value_heads
    renamed = {
        "input_layernorm": "mixer_norm",
        "post_attention_layernorm": "mlp_norm",
        "self_attn.o_proj": "sequence_mixer.output",
        "mlp.down_proj": "mlp.down",
    }
    ours = {
        "embedding.weight": theirs["model.embed_tokens.weight"],
        "final_norm.weight": theirs["model.norm.weight"],
    }
    if "lm_head.weight" in theirs and not config.tie_word_embeddings:
        ours["lm_head.weight"] = theirs["lm_head.weight"]
    for i in range(LAYERS):
        for kind in ("weight", "bias"):
            get = {
                name.removeprefix(f"model.layers.{i}.").removesuffix(f".{kind}"): tensor
                for name, tensor in theirs.items()
                if name.startswith(f"model.layers.{i}.") and name.endswith(f".{kind}")
            }
            for old, new in renamed.items():
                if old in get:
                    ours[f"blocks.{i}.{new}.{kind}"] = get[old]
            if "self_attn.q_proj" in get:
                heads = [get[f"self_attn.{x}_proj"].unflatten(0, (K, -1)) for x in "qkv"]
                ours[f"blocks.{i}.sequence_mixer.qkv.{kind}"] = torch.cat(heads, 1).flatten(0, 1)
            if "mlp.up_proj" in get:
                both = torch.stack((get["mlp.gate_proj"], get["mlp.up_proj"]), 1)
                ours[f"blocks.{i}.mlp.gate_up.{kind}"] = both.flatten(0, 1)
    return ours


def pair(family, fields, dtype):
    config, theirs = their_model(family, fields, dtype)
    ours = our_model(config, dtype)
    ours.load_state_dict(in_our_layout(config, theirs.state_dict()), strict=True)
    return config, theirs, ours


# float64 with the other side's casts lifted, relative to the largest value: rounding. float32 with
# transformers untouched: a few hundred roundings of 6e-8.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize(("family", "fields"), CASES)
def test_logits_loss_and_gradients_agree(family, fields, dtype, tolerance):
    with casts_lifted(dtype):
        config, theirs, ours = pair(family, fields, dtype)
        ids = torch.randint(0, V, (B, S), generator=torch.Generator().manual_seed(1))
        labels = ids.roll(-1, 1).masked_fill(torch.arange(S) == S - 1, -100)
        expected = theirs(input_ids=ids).logits
        loss = F.cross_entropy(expected.flatten(0, 1), labels.flatten(), reduction="sum")
        loss.backward()
    batch = {"input_ids": ids, "labels": labels}
    logits = ours(batch).logits
    assert relative(logits, expected) < tolerance
    nll = ours(batch, logits=False).nll_sum
    assert relative(nll, loss) < tolerance
    nll.backward()
    gradients = in_our_layout(config, {n: p.grad for n, p in theirs.named_parameters()})
    ours_by_name = dict(ours.named_parameters())
    assert gradients.keys() == ours_by_name.keys()
    for name, gradient in gradients.items():
        assert relative(ours_by_name[name].grad, gradient) < tolerance, name


@pytest.mark.parametrize(("family", "fields"), CASES)
def test_left_padded_prompts_agree(family, fields):
    with casts_lifted(torch.float64):
        _, theirs, ours = pair(family, fields, torch.float64)
        prompts = [[5, 6, 7, 8, 9], [3, 4], [10, 11, 12, 13, 14, 15, 16]]
        ids, valid = left_pad(prompts)
        positions = (valid.long().cumsum(-1) - 1).clamp(min=0)
        with torch.no_grad():
            expected = theirs(
                input_ids=ids, attention_mask=valid.long(), position_ids=positions
            ).logits[:, -1]
    got = next_logits(ours, {"input_ids": ids, "valid": valid}, ours.new_cache(3, 7))
    assert relative(got, expected) < 1e-9


def relative(got, expected):
    return ((got - expected).abs().max() / expected.abs().max()).item()
