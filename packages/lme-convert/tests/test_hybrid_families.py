"""Families with norms elsewhere, windows by layer or recurrent layers: there and back, refusals.

That the models compute the same is tested with models of ours, where all packages meet.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lme_convert.api import export_to_hf, import_from_hf, open_model
from lme_convert.directory import ModelDirectory
from lme_convert.errors import ConversionError, UnsupportedModelError
from lme_convert.families import expected_parameters

YARN = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 10, "sliding_window": 5}
MAMBA = {"num_heads": 8, "head_dim": 8, "n_groups": 2, "state_size": 5, "chunk_size": 8}
HYBRID = {
    "layer_types": ["mamba", "attention"],
    "mamba_n_heads": 8,
    "mamba_n_groups": 2,
    "mamba_d_state": 5,
    "num_local_experts": 4,
    "intermediate_size": 12,
    "shared_intermediate_size": 20,
    "position_embedding_type": "nope",
}
NEXT = {
    "layer_types": ["linear_attention", "full_attention"],
    "head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 5,
    "linear_value_head_dim": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 12,
    "intermediate_size": 12,
    "shared_expert_intermediate_size": 20,
}
CASES = {
    "olmo2": ("olmo2", {}),
    "olmo2-biases-tied": (
        "olmo2",
        {"attention_bias": True, "tie_word_embeddings": True, "rope_parameters": YARN},
    ),
    "gemma2": ("gemma2", GEMMA),
    "gemma2-unbounded-untied": (
        "gemma2",
        GEMMA
        | {
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "tie_word_embeddings": False,
            "attention_bias": True,
            "use_bidirectional_attention": False,
        },
    ),
    "gemma3": ("gemma3_text", GEMMA | {"layer_types": ["full_attention", "sliding_attention"]}),
    "gemma3-scaled": (
        "gemma3_text",
        GEMMA
        | {
            "final_logit_softcapping": 30.0,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 500.0, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 70.0},
            },
        },
    ),
    "mamba2": ("mamba2", MAMBA),
    "mamba2-biases-limits": (
        "mamba2",
        MAMBA
        | {
            "use_bias": True,
            "use_conv_bias": False,
            "time_step_limit": [0.1, 0.5],
            "tie_word_embeddings": True,
        },
    ),
    "granitemoehybrid": ("granitemoehybrid", HYBRID),
    "granitemoehybrid-dense": (
        "granitemoehybrid",
        HYBRID
        | {
            "num_local_experts": 0,
            "num_experts_per_tok": 0,
            "intermediate_size": 20,
            "position_embedding_type": "rope",
            "mamba_proj_bias": True,
            "attention_bias": True,
            "time_step_limit": [0.1, 0.5],
            "embedding_multiplier": 3.0,
        },
    ),
    "granitemoehybrid-attention-only": (
        "granitemoehybrid",
        HYBRID
        | {
            "layer_types": ["attention", "attention"],
            "mamba_expand": 1,
            "mamba_n_heads": 1,
            "mamba_n_groups": 1,
            "mamba_d_state": 256,
        },
    ),
    "qwen3_next": ("qwen3_next", NEXT),
    "qwen3_next-dense-layer-biases": (
        "qwen3_next",
        NEXT
        | {
            "mlp_only_layers": [0],
            "intermediate_size": 28,
            "attention_bias": True,
            "norm_topk_prob": False,
            "rope_parameters": YARN | {"partial_rotary_factor": 0.5},
        },
    ),
}
# Fields that say nothing where these are their values: which spelling a file has is not kept.
IDLE = ("_name_or_path", "transformers_version", "_sliding_window_pattern", "partial_rotary_factor")

# Of the sizes that all small models here are given, those that Mamba 2 has no use for.
OF_OTHERS = (
    "intermediate_size",
    "max_position_embeddings",
    "num_attention_heads",
    "num_key_value_heads",
)


def load_all(path: Path) -> dict[str, torch.Tensor]:
    files = path.glob("*.safetensors")
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def read_config(path: Path) -> dict:
    """What transformers makes of the file, without where it lies and what wrote it."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(path).to_dict()
    of_no_class = OF_OTHERS if config["model_type"] == "mamba2" else ()
    for name in (*IDLE, *of_no_class, "dtype", "use_cache"):
        config.pop(name, None)
    return config


def edit_config(path: Path, block: str | None = None, layer: int = 0, **changes) -> None:
    file = path / "config.json"
    config = json.loads(file.read_text())
    (config if block is None else config[block][layer]).update(changes)
    file.write_text(json.dumps({k: v for k, v in config.items() if v != "absent"}))


@pytest.mark.parametrize("case", CASES)
def test_there_and_back_is_bit_equal(case, save_hf, tmp_path):
    model_type, changes = CASES[case]
    source = save_hf(tmp_path / "theirs", model_type, **changes)
    import_from_hf(source, tmp_path / "ours")
    directory = ModelDirectory(tmp_path / "ours")
    expected = expected_parameters(directory.config)
    assert {name: directory.shape(name) for name in directory.names} == expected
    export_to_hf(tmp_path / "ours", tmp_path / "back", model_type)
    first, second = load_all(source), load_all(tmp_path / "back")
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(second[name], tensor), name
    theirs, back = read_config(source), read_config(tmp_path / "back")
    # Null and false are the same here.
    for config in (theirs, back):
        config["use_bidirectional_attention"] = bool(config.get("use_bidirectional_attention"))
    assert theirs == back


def test_rows_of_gated_attention_lie_where_the_layout_says(save_hf, tmp_path):
    source = save_hf(tmp_path / "theirs", "qwen3_next", **NEXT)
    theirs, ours = load_all(source), open_model(source)
    attention = "model.layers.1.self_attn."
    qkv = ours["blocks.1.sequence_mixer.qkv.weight"]
    # Two groups of [2 queries, key, value, 2 gates], 8 channels each; theirs [query, gate] a head.
    queries = theirs[f"{attention}q_proj.weight"]
    assert torch.equal(qkv[48:56], queries[32:40])
    assert torch.equal(qkv[56:64], queries[48:56])
    assert torch.equal(qkv[64:72], theirs[f"{attention}k_proj.weight"][8:16])
    assert torch.equal(qkv[80:88], queries[40:48])
    assert torch.equal(qkv[88:96], queries[56:64])


def test_rows_of_a_delta_net_lie_where_the_layout_says(save_hf, tmp_path):
    source = save_hf(tmp_path / "theirs", "qwen3_next", **NEXT)
    theirs, ours = load_all(source), open_model(source)
    first = theirs["model.layers.0.linear_attn.in_proj_qkvz.weight"]
    second = theirs["model.layers.0.linear_attn.in_proj_ba.weight"]
    qkv = ours["blocks.0.sequence_mixer.qkv.weight"]
    gates = ours["blocks.0.sequence_mixer.gates.weight"]
    # Of a key head: query 5, key 5, values 3 * 4, gates 3 * 4; strengths 3, steps 3.
    assert torch.equal(qkv[5:10], first[34:39])
    assert torch.equal(qkv[15:20], first[39:44])
    assert torch.equal(qkv[32:44], first[44:56])
    assert torch.equal(gates[3:6], second[9:12])
    assert torch.equal(gates[9:12], second[6:9])
    assert torch.equal(gates[24:36], first[56:68])


def test_older_files_of_gemma_3_mean_the_same(save_hf, tmp_path):
    source = save_hf(tmp_path / "theirs", "gemma3_text", **CASES["gemma3-scaled"][1])
    expected = open_model(source).config
    edit_config(
        source,
        rope_parameters="absent",
        rope_theta=500.0,
        rope_local_base_freq=70.0,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
        layer_types="absent",
        sliding_window_pattern=6,
    )
    assert open_model(source).config == expected
    edit_config(source, sliding_window_pattern=2)
    blocks = open_model(source).config["sequence_mixer_blocks"]
    assert [block["sliding_window"] for block in blocks] == [5, None]
    assert [block["rope_theta"] for block in blocks] == [70.0, None]


def test_newer_names_of_layers_and_spellings_of_infinity_mean_the_same(save_hf, tmp_path):
    source = save_hf(tmp_path / "theirs", "granitemoehybrid", **HYBRID)
    expected = open_model(source).config
    for kinds, last in (
        (["mamba", "attention"], float("inf")),
        (["linear_attention", "full_attention"], {"__float__": "Infinity"}),
    ):
        edit_config(source, layer_types=kinds, time_step_limit=[0.0, last])
        assert open_model(source).config == expected


@pytest.mark.parametrize(
    ("case", "changes", "named"),
    [
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma2", {"hidden_activation": "tanh"}, "hidden_activation"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ("gemma3", {"layer_types": ["chunked_attention"] * 2}, "chunked_attention"),
        (
            "gemma3",
            {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
            "rope_type",
        ),
        ("mamba2", {"hidden_act": "mish"}, "hidden_act"),
        ("granitemoehybrid", {"position_embedding_type": "alibi"}, "alibi"),
        ("granitemoehybrid", {"layer_types": ["mamba", "conv"]}, "conv"),
        ("qwen3_next", {"hidden_act": "gelu"}, "hidden_act"),
    ],
    ids=str,
)
def test_an_unsupported_variant_is_refused_by_name(case, changes, named, save_hf, tmp_path):
    model_type, fields = CASES[case]
    source = save_hf(tmp_path / "theirs", model_type, **fields)
    edit_config(source, **changes)
    with pytest.raises(UnsupportedModelError, match=named):
        import_from_hf(source, tmp_path / "ours")


@pytest.mark.parametrize(
    ("case", "changes"),
    [
        ("gemma2", {"query_pre_attn_scalar": 0}),
        ("gemma3", {"rope_parameters": {"full_attention": 3}}),
        ("mamba2", {"num_heads": 7}),
        ("mamba2", {"time_step_limit": [0.2, 0.1]}),
        ("mamba2", {"time_step_limit": ["0.1", 2.0]}),
        ("granitemoehybrid", {"mamba_d_head": 5}),
        ("qwen3_next", {"partial_rotary_factor": 2.0, "rope_parameters": None}),
        ("qwen3_next", {"linear_num_value_heads": 5}),
    ],
    ids=str,
)
def test_a_config_that_does_not_fit_is_refused(case, changes, save_hf, tmp_path):
    model_type, fields = CASES[case]
    source = save_hf(tmp_path / "theirs", model_type, **fields)
    edit_config(source, **changes)
    with pytest.raises(ConversionError, match=r"`|heads"):
        import_from_hf(source, tmp_path / "ours")


@pytest.mark.parametrize(
    ("case", "block", "changes", "named"),
    [
        ("olmo2", None, {"norm_placement": "pre"}, "norm_placement|no rule"),
        ("olmo2", "sequence_mixer_blocks", {"qk_norm_across_heads": False}, "qk_norm_across_heads"),
        ("gemma2", None, {"m_emb": 2.0}, "m_emb"),
        ("gemma2", None, {"zero_centered_norms": False}, "zero_centered_norms"),
        ("gemma2", "sequence_mixer_blocks", {"rope_theta": 5.0}, "rope_theta"),
        ("gemma2", "sequence_mixer_blocks", {"attention_multiplier": 0.3}, "attention_multiplier"),
        ("gemma3", "sequence_mixer_blocks", {"rope_theta": 5.0}, "rope_theta"),
        ("mamba2", "mlp_blocks", {"mlp_type": "MLP"}, "mlp_type"),
        ("mamba2", "sequence_mixer_blocks", {"normalize_by_group": False}, "normalize_by_group"),
        ("mamba2", "sequence_mixer_blocks", {"intermediate_size": 40}, "intermediate_size"),
        (
            "granitemoehybrid",
            "sequence_mixer_blocks",
            {"activation_function": "relu"},
            "activation",
        ),
        ("granitemoehybrid", "mlp_blocks", {"shared_intermediate_size": None}, "shared_inter"),
        ("qwen3_next", None, {"rope_channels": "last"}, "rope_channels"),
        ("qwen3_next", "sequence_mixer_blocks", {"norm_before_gate": False}, "norm_before_gate"),
    ],
    ids=str,
)
def test_what_a_family_cannot_express_is_refused_on_export(
    case, block, changes, named, save_hf, tmp_path
):
    model_type, fields = CASES[case]
    import_from_hf(save_hf(tmp_path / "theirs", model_type, **fields), tmp_path / "ours")
    edit_config(tmp_path / "ours", block, **changes)
    with pytest.raises(ConversionError, match=named):
        export_to_hf(tmp_path / "ours", tmp_path / "out", model_type)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"norm_placement": "post"},
        {"zero_centered_norms": True},
        {"logit_softcap": 30.0},
        {"mlp_blocks": [{"mlp_type": "none"}]},
    ],
    ids=str,
)
def test_a_llama_has_none_of_this(changes, save_hf, tmp_path):
    import_from_hf(save_hf(tmp_path / "theirs"), tmp_path / "ours")
    edit_config(tmp_path / "ours", **changes)
    with pytest.raises(ConversionError, match=next(iter(changes)) + "|mlp_type"):
        export_to_hf(tmp_path / "ours", tmp_path / "out", "llama")
