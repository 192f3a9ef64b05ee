"""Families with mixtures of experts: there and back, where tensors lie, what is refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lme_convert.api import export_to_hf, import_from_hf, open_model
from lme_convert.directory import ModelDirectory
from lme_convert.errors import ConversionError, UnsupportedModelError
from lme_convert.families import expected_parameters

QWEN = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 12,
    "intermediate_size": 12,
}
QWEN2 = QWEN | {"shared_expert_intermediate_size": 20}
GRANITE = {
    "num_local_experts": 4,
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.5,
    "logits_scaling": 2.0,
    "attention_multiplier": 0.1,
}
DEEPSEEK = {
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "n_group": 4,
    "topk_group": 2,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 12,
    "n_shared_experts": 2,
    "kv_lora_rank": 10,
    "q_lora_rank": 9,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 5,
    "first_k_dense_replace": 1,
    "num_mtp_layers": 0,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "mscale": 1.0,
    "mscale_all_dim": 0.7,
}
CASES = {
    "mixtral": ("mixtral", {"num_local_experts": 4}),
    "mixtral-window": (
        "mixtral",
        {
            "num_local_experts": 3,
            "num_experts_per_tok": 1,
            "sliding_window": 7,
            "head_dim": 12,
            "rms_norm_eps": 1e-4,
            "tie_word_embeddings": True,
            "router_aux_loss_coef": 0.02,
        },
    ),
    "qwen2_moe": ("qwen2_moe", QWEN2),
    "qwen2_moe-dense-layer-windows": (
        "qwen2_moe",
        QWEN2
        | {
            "intermediate_size": 28,
            "mlp_only_layers": [0],
            "norm_topk_prob": True,
            "qkv_bias": False,
            "use_sliding_window": True,
            "sliding_window": 5,
            "layer_types": ["full_attention", "sliding_attention"],
        },
    ),
    "qwen3_moe": ("qwen3_moe", QWEN | {"head_dim": 6, "norm_topk_prob": True}),
    "qwen3_moe-dense-layer-window": (
        "qwen3_moe",
        QWEN
        | {
            "intermediate_size": 28,
            "mlp_only_layers": [1],
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 5,
        },
    ),
    "granitemoe": ("granitemoe", GRANITE),
    "granitemoe-biases": ("granitemoe", {"num_local_experts": 3, "attention_bias": True}),
    "granitemoeshared": ("granitemoeshared", GRANITE | {"shared_intermediate_size": 20}),
    "granitemoeshared-none": ("granitemoeshared", GRANITE | {"shared_intermediate_size": 0}),
    "deepseek_v3": ("deepseek_v3", DEEPSEEK),
    "deepseek_v3-plain-queries-yarn": (
        "deepseek_v3",
        DEEPSEEK
        | {
            "q_lora_rank": None,
            "n_group": 1,
            "topk_group": 1,
            "n_shared_experts": 1,
            "norm_topk_prob": False,
            "routed_scaling_factor": 1.0,
            "first_k_dense_replace": 0,
            "intermediate_size": 12,
            "rms_norm_eps": 1e-4,
            "rope_parameters": YARN,
        },
    ),
}


def load_all(path: Path) -> dict[str, torch.Tensor]:
    files = path.glob("*.safetensors")
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def read_config(path: Path) -> dict:
    """What transformers makes of the file, without where it lies and what wrote it."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(path).to_dict()
    for name in ("_name_or_path", "transformers_version"):
        config.pop(name)
    # It has an effect only where there are windows; there it is said by `layer_types`.
    config.pop("max_window_layers", None)
    return config


def edit_config(path: Path, **changes) -> None:
    file = path / "config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in config.items() if v != "absent"}))


@pytest.mark.parametrize("case", CASES)
def test_there_and_back_is_bit_equal(case, save_hf, tmp_path):
    model_type, changes = CASES[case]
    source = save_hf(tmp_path / "theirs", model_type, **changes)
    import_from_hf(source, tmp_path / "ours")
    ours = ModelDirectory(tmp_path / "ours")
    assert {name: ours.shape(name) for name in ours.names} == expected_parameters(ours.config)
    export_to_hf(tmp_path / "ours", tmp_path / "back")
    first, second = load_all(source), load_all(tmp_path / "back")
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(second[name], tensor), name
    assert read_config(source) == read_config(tmp_path / "back")


@pytest.fixture
def opened(save_hf, tmp_path):
    """A function that saves a model of a case and opens it: their tensors, and ours."""

    def save(case, **changes):
        model_type, fields = CASES[case]
        source = save_hf(tmp_path / "theirs", model_type, **(fields | changes))
        return load_all(source), open_model(source)

    return save


def test_rows_of_experts_stored_one_by_one_alternate(opened):
    theirs, ours = opened("mixtral")
    at, layer = "blocks.1.mlp", "model.layers.1.block_sparse_moe"
    for expert in range(4):
        gate_up = ours[f"{at}.experts.gate_up.weight"][expert]
        assert torch.equal(gate_up[0::2], theirs[f"{layer}.experts.{expert}.w1.weight"])
        assert torch.equal(gate_up[1::2], theirs[f"{layer}.experts.{expert}.w3.weight"])
        down = ours[f"{at}.experts.down.weight"][expert]
        assert torch.equal(down, theirs[f"{layer}.experts.{expert}.w2.weight"])


def test_rows_of_experts_packed_gates_first_alternate(opened):
    theirs, ours = opened("granitemoeshared")
    layer = "model.layers.0"
    packed = theirs[f"{layer}.block_sparse_moe.input_linear.weight"]
    gate_up = ours["blocks.0.mlp.experts.gate_up.weight"]
    assert torch.equal(gate_up[:, 0::2], packed[:, :48])
    assert torch.equal(gate_up[:, 1::2], packed[:, 48:])
    shared = ours["blocks.0.mlp.shared.gate_up.weight"]
    assert torch.equal(shared[1::2], theirs[f"{layer}.shared_mlp.input_linear.weight"][20:])


def test_rows_of_latent_attention_lie_where_the_layout_says(opened):
    theirs, ours = opened("deepseek_v3")
    at, layer = "blocks.1.sequence_mixer", "model.layers.1.self_attn"
    # 4 heads of 6 channels that stay and 4 that rotate; 10 compressed channels, then 4 that rotate.
    query, query_up = theirs[f"{layer}.q_b_proj.weight"], ours[f"{at}.query_up.weight"]
    assert torch.equal(query_up[10:16], query[10:16])
    assert torch.equal(query_up[16:20], query[[16, 18, 17, 19]])
    down = theirs[f"{layer}.kv_a_proj_with_mqa.weight"]
    assert torch.equal(ours[f"{at}.key_value_down.weight"], down[[*range(10), 10, 12, 11, 13]])
    both = theirs[f"{layer}.kv_b_proj.weight"]
    assert torch.equal(ours[f"{at}.key_up.weight"][6:12], both[11:17])
    assert torch.equal(ours[f"{at}.value_up.weight"][5:10], both[17:22])


def test_a_bias_for_choosing_is_not_rounded_with_the_weights(save_hf, tmp_path):
    source = save_hf(tmp_path / "theirs", "deepseek_v3", **DEEPSEEK)
    tensors = load_all(source)
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    tensors[name] = torch.arange(8) * 1e-3 + 1
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    import_from_hf(source, tmp_path / "ours", dtype=torch.bfloat16)
    ours = load_all(tmp_path / "ours")
    assert torch.equal(ours["blocks.1.mlp.router.selection_bias"], tensors[name])
    assert ours["blocks.1.mlp.router.weight"].dtype == torch.bfloat16
    export_to_hf(tmp_path / "ours", tmp_path / "back", dtype=torch.float16)
    assert torch.equal(load_all(tmp_path / "back")[name], tensors[name])


def test_the_two_names_of_a_number_of_experts_mean_the_same(save_hf, tmp_path):
    source = save_hf(tmp_path / "theirs", "qwen3_moe", **QWEN)
    expected = open_model(source).config
    assert expected["mlp_blocks"][0]["num_experts"] == 4
    edit_config(source, num_local_experts="absent", num_experts=4)
    assert open_model(source).config == expected


def test_every_second_layer_may_be_dense(save_hf, tmp_path):
    source = save_hf(tmp_path / "theirs", "qwen3_moe", **QWEN, decoder_sparse_step=2)
    kinds = [block["mlp_type"] for block in open_model(source).config["mlp_blocks"]]
    assert kinds == ["MLP", "MoE"]


def test_a_file_without_a_base_of_rotation_means_the_class_default(save_hf, tmp_path):
    source = save_hf(tmp_path / "theirs", "mixtral", num_local_experts=4)
    edit_config(source, rope_parameters="absent", rms_norm_eps="absent")
    config = open_model(source).config
    assert (config["rope_theta"], config["layer_norm_epsilon"]) == (1e6, 1e-5)


@pytest.mark.parametrize(
    ("case", "changes", "named"),
    [
        ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise"),
        ("mixtral", {"hidden_act": "tanh"}, "hidden_act"),
        ("qwen2_moe", {"use_sliding_window": True, "layer_types": "absent"}, "layer_types"),
        ("deepseek_v3", {"rope_interleave": False}, "rope_interleave"),
        ("deepseek_v3", {"attention_bias": True}, "attention_bias"),
        ("deepseek_v3", {"num_key_value_heads": 2}, "num_key_value_heads"),
        ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func"),
        ("deepseek_v3", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_an_unsupported_variant_is_refused_by_name(case, changes, named, save_hf, tmp_path):
    model_type, fields = CASES[case]
    source = save_hf(tmp_path / "theirs", model_type, **fields)
    edit_config(source, **changes)
    with pytest.raises(UnsupportedModelError, match=f"`{named}`"):
        import_from_hf(source, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    ("case", "changes", "named"),
    [
        ("mixtral", {"num_local_experts": 5}, "experts.4"),
        ("mixtral", {"num_local_experts": 3}, "experts.3"),
        ("mixtral", {"num_local_experts": 2**30}, "num_experts"),
        ("granitemoe", {"num_local_experts": 3}, "router.layer.weight"),
        ("granitemoe", {"intermediate_size": 47}, "input_linear"),
        ("qwen2_moe", {"mlp_only_layers": [2]}, "mlp_only_layers"),
        ("qwen2_moe", {"mlp_only_layers": [0]}, "model.layers.0.mlp.gate_proj.weight"),
        ("deepseek_v3", {"kv_lora_rank": 11}, "kv_"),
        ("deepseek_v3", {"q_lora_rank": None}, "q_proj"),
        ("deepseek_v3", {"first_k_dense_replace": 2}, "layers.1.mlp"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_config_that_does_not_fit_is_refused(case, changes, named, save_hf, tmp_path):
    model_type, fields = CASES[case]
    source = save_hf(tmp_path / "theirs", model_type, **fields)
    edit_config(source, **changes)
    with pytest.raises(ConversionError, match=named):
        import_from_hf(source, tmp_path / "ours")


def test_modules_that_predict_further_tokens_are_not_dropped_silently(save_hf, tmp_path):
    source = save_hf(tmp_path / "theirs", "deepseek_v3", **DEEPSEEK)
    further = {"model.layers.2.eh_proj.weight": torch.ones(32, 64)}
    save_file(load_all(source) | further, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConversionError, match=r"holds tensor `model.layers.2.eh_proj.weight`"):
        import_from_hf(source, tmp_path / "ours")


@pytest.mark.parametrize(
    ("case", "block", "changes", "named"),
    [
        ("mixtral", "mlp_blocks", {"normalized_topk": False}, "normalized_topk"),
        ("mixtral", "mlp_blocks", {"routed_scaling_factor": 2.0}, "routed_scaling_factor"),
        ("mixtral", "mlp_blocks", {"router_score_function": "sigmoid"}, "router_score_function"),
        ("mixtral", "mlp_blocks", {"expert_bias_update_rate": 0.0}, "expert_bias_update_rate"),
        ("mixtral", "mlp_blocks", {"shared_intermediate_size": 8}, "shared_intermediate_size"),
        ("mixtral", "mlp_blocks", {"add_bias": True}, "add_bias"),
        ("mixtral", "sequence_mixer_blocks", {"attention_multiplier": 0.3}, "attention_multiplier"),
        ("qwen2_moe", "mlp_blocks", {"shared_expert_gating": False}, "shared_expert_gating"),
        ("qwen3_moe", "sequence_mixer_blocks", {"qk_norm": False}, "qk_norm"),
        ("granitemoe", "mlp_blocks", {"num_expert_groups": 2}, "num_expert_groups"),
        ("deepseek_v3", "mlp_blocks", {"shared_intermediate_size": 13}, "shared_intermediate_size"),
        ("deepseek_v3", "mlp_blocks", {"expert_bias_update_rate": None}, "expert_bias_update_rate"),
        ("deepseek_v3", "mlp_blocks", {"router_score_function": "softmax"}, "router_score"),
        ("deepseek_v3", "mlp_blocks", {"activation_function": "geglu"}, "activation_function"),
        ("deepseek_v3", "sequence_mixer_blocks", {"share_compression": False}, "share_compression"),
        ("deepseek_v3", "sequence_mixer_blocks", {"normalization_epsilon": 1e-5}, "epsilon"),
        ("deepseek_v3", "sequence_mixer_blocks", {"attention_multiplier": 0.3}, "attention_mult"),
        ("deepseek_v3", "sequence_mixer_blocks", {"sliding_window": 4}, "sliding_window"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_a_family_cannot_express_is_refused_on_export(
    case, block, changes, named, save_hf, tmp_path
):
    model_type, fields = CASES[case]
    import_from_hf(save_hf(tmp_path / "theirs", model_type, **fields), tmp_path / "ours")
    file = tmp_path / "ours" / "config.json"
    config = json.loads(file.read_text())
    config[block][-1].update(changes)
    file.write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match=named):
        export_to_hf(tmp_path / "ours", tmp_path / "out", model_type)
    assert not (tmp_path / "out").exists()


def test_dense_layers_come_first_in_deepseek(save_hf, tmp_path):
    import_from_hf(save_hf(tmp_path / "theirs", "deepseek_v3", **DEEPSEEK), tmp_path / "ours")
    file = tmp_path / "ours" / "config.json"
    config = json.loads(file.read_text())
    for blocks, message in (
        (config["mlp_blocks"][::-1], "dense layers first"),
        (config["mlp_blocks"][:1] * 2, "mixtures of experts"),
    ):
        file.write_text(json.dumps(config | {"mlp_blocks": blocks}))
        with pytest.raises(UnsupportedModelError, match=message):
            export_to_hf(tmp_path / "ours", tmp_path / "out", "deepseek_v3")
