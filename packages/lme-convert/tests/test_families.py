import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lme_convert.api import export_to_hf, import_from_hf, open_model
from lme_convert.directory import ModelDirectory
from lme_convert.errors import ConversionError, UnsupportedModelError
from lme_convert.families import FAMILIES, expected_parameters

GRANITE = {
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.5,
    "logits_scaling": 2.0,
    "attention_multiplier": 0.1,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}

# Family, and what of it the case is there for.
CASES = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-multi-head": ("llama", {"num_key_value_heads": 4}),
    "llama-multi-query": ("llama", {"num_key_value_heads": 1, "vocab_size": 97}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-attention-bias-only": ("llama", {"attention_bias": True}),
    "llama-mlp-bias-only": ("llama", {"mlp_bias": True}),
    "llama-head-dim": ("llama", {"head_dim": 14}),
    "llama-eos-list": ("llama", {"eos_token_id": [2, 5, 7], "pad_token_id": None}),
    "llama-no-ids": ("llama", {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}),
    "llama-llama3": ("llama", {"rope_parameters": LLAMA3}),
    "llama-yarn": ("llama", {"rope_parameters": YARN}),
    "llama-yarn-factor": ("llama", {"rope_parameters": YARN | {"attention_factor": 1.3}}),
    "llama-linear": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 50.0, "factor": 2.0}},
    ),
    "llama-gelu": ("llama", {"hidden_act": "gelu"}),
    "llama-gelu-tanh": ("llama", {"hidden_act": "gelu_pytorch_tanh"}),
    "llama-training-settings": ("llama", {"attention_dropout": 0.1, "initializer_range": 0.5}),
    "granite": ("granite", GRANITE),
    "granite-tied": ("granite", GRANITE | {"tie_word_embeddings": True}),
    "granite-plain": ("granite", {"attention_bias": True, "mlp_bias": True}),
    "granite-head-dim": ("granite", GRANITE | {"head_dim": 10}),
    "granite-llama3": ("granite", GRANITE | {"rope_parameters": LLAMA3}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral-window": ("mistral", {"sliding_window": 7, "head_dim": 12}),
    "qwen2": ("qwen2", {}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2-windows": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3-bias-windows": (
        "qwen3",
        {
            "head_dim": 6,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 5,
            "max_window_layers": 1,
        },
    ),
}


def load_all(path: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for file in path.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }


def assert_same_weights(one: Path, other: Path) -> None:
    first, second = load_all(one), load_all(other)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert second[name].dtype == tensor.dtype, name
        assert torch.equal(second[name], tensor), name


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
def test_there_and_back_is_bit_equal_and_logits_agree(case, save_hf, build_model, tmp_path):
    model_type, changes = CASES[case]
    source = save_hf(tmp_path / "theirs", model_type, **changes)
    certificate = import_from_hf(source, tmp_path / "ours", build_model=build_model)
    # Both sides sum in fp32 in another order; logits are of size 1 to 10.
    assert certificate.max_logit_difference <= 1e-5
    assert certificate.kl <= 1e-9
    assert certificate.first_differing_layer is None

    certificate = export_to_hf(tmp_path / "ours", tmp_path / "back", build_model=build_model)
    assert certificate.status == "certified"
    assert certificate.max_logit_difference <= 1e-5
    assert_same_weights(source, tmp_path / "back")
    assert read_config(source) == read_config(tmp_path / "back")


def test_every_family_has_a_round_trip_case():
    """Here, or in the files beside this one about families of one kind."""
    files = Path(__file__).parent.glob("test_*families.py")
    tests = "".join(file.read_text() for file in files)
    assert [name for name in FAMILIES if not re.search(rf'\(\s*"{name}",', tests)] == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sharded_sources_of_low_precision_stay_as_they_are(dtype, save_hf, tmp_path):
    source = save_hf(tmp_path / "theirs", dtype=dtype, max_shard_size="10KB")
    assert len(list(source.glob("*.safetensors"))) > 2
    import_from_hf(source, tmp_path / "ours", max_shard_bytes=20_000)
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 1
    export_to_hf(tmp_path / "ours", tmp_path / "back")
    assert_same_weights(source, tmp_path / "back")
    assert read_config(source) == read_config(tmp_path / "back")
    assert len(list((tmp_path / "back").glob("*.safetensors"))) == 1


def test_our_names_and_shapes_are_those_expected(save_hf, tmp_path):
    import_from_hf(save_hf(tmp_path / "theirs", attention_bias=True), tmp_path / "ours")
    directory = ModelDirectory(tmp_path / "ours")
    expected = expected_parameters(directory.config)
    assert {name: directory.shape(name) for name in directory.names} == expected
    # 4 query and 2 key-value heads of 8 channels: two groups of (2 + 1 + 1) heads.
    assert expected["blocks.1.sequence_mixer.qkv.weight"] == (64, 32)
    assert expected["blocks.1.sequence_mixer.qkv.bias"] == (64,)
    assert expected["blocks.0.mlp.gate_up.weight"] == (96, 32)


def test_rows_lie_where_the_layout_says(save_hf, tmp_path):
    source = save_hf(tmp_path / "theirs")
    theirs, ours = load_all(source), open_model(source)
    first, layer = "model.layers.1.", "blocks.1."
    gate_up = ours[f"{layer}mlp.gate_up.weight"]
    assert torch.equal(gate_up[0::2], theirs[f"{first}mlp.gate_proj.weight"])
    assert torch.equal(gate_up[1::2], theirs[f"{first}mlp.up_proj.weight"])
    qkv = ours[f"{layer}sequence_mixer.qkv.weight"]
    assert torch.equal(qkv[32:48], theirs[f"{first}self_attn.q_proj.weight"][16:32])
    assert torch.equal(qkv[48:56], theirs[f"{first}self_attn.k_proj.weight"][8:16])
    assert torch.equal(qkv[24:32], theirs[f"{first}self_attn.v_proj.weight"][0:8])


def test_files_of_transformers_4_mean_the_same(save_hf, build_model, tmp_path):
    """`rope_theta` and `rope_scaling` beside each other, `type` for `rope_type`, no `head_dim`."""
    source = save_hf(tmp_path / "theirs", rope_parameters=LLAMA3)
    scaling = {key: value for key, value in LLAMA3.items() if key != "rope_theta"}
    expected = open_model(source).config
    for kind in ("rope_type", "type"):
        old = {kind: scaling["rope_type"], **scaling}
        if kind == "type":
            del old["rope_type"]
        edit_config(
            source, rope_parameters="absent", rope_theta=500.0, rope_scaling=old, head_dim="absent"
        )
        assert open_model(source).config == expected
        certificate = import_from_hf(source, tmp_path / f"ours-{kind}", build_model=build_model)
        assert certificate.status == "certified"


def test_a_file_without_token_ids_means_the_class_defaults(save_hf, tmp_path):
    source = save_hf(tmp_path / "theirs")
    edit_config(source, bos_token_id="absent", eos_token_id="absent", pad_token_id="absent")
    config = open_model(source).config
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 2, None)
    edit_config(source, eos_token_id=None, pad_token_id=-1)
    config = open_model(source).config
    assert (config["eos_token_id"], config["pad_token_id"]) == (None, None)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"hidden_act": "tanh"}, "hidden_act"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "longrope"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"rope_scaling": {"rope_type": "default", "mrope_section": [1, 1]}}, "mrope_section"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"model_type": "bert"}, "bert"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_an_unsupported_variant_is_refused_by_name(changes, named, save_hf, tmp_path):
    source = save_hf(tmp_path / "theirs")
    edit_config(source, **changes)
    with pytest.raises(UnsupportedModelError, match=named):
        import_from_hf(source, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": "32"},
        {"hidden_size": -32},
        {"num_hidden_layers": 10**9},
        {"num_attention_heads": 5},
        {"rms_norm_eps": float("nan")},
        {"tie_word_embeddings": 1},
        {"eos_token_id": ["</s>"]},
        {"rope_scaling": "yarn"},
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
        {"vocab_size": "absent"},
        {"num_hidden_layers": 3},
        {"num_hidden_layers": 1},
        {"intermediate_size": 47},
        {"attention_bias": True},
    ],
    ids=str,
)
def test_a_config_that_does_not_fit_is_refused(changes, save_hf, tmp_path):
    source = save_hf(tmp_path / "theirs")
    edit_config(source, **changes)
    with pytest.raises(ConversionError, match=r"`"):
        import_from_hf(source, tmp_path / "ours")


def test_a_tied_head_that_is_stored_twice_must_be_the_embedding(save_hf, tmp_path):
    source = save_hf(tmp_path / "theirs", tie_word_embeddings=True)
    tensors = load_all(source)
    # And a table that files of old versions carried.
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    import_from_hf(source, tmp_path / "ours")
    assert "lm_head.weight" not in ModelDirectory(tmp_path / "ours")
    tensors["lm_head.weight"][-1, -1] += 1
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConversionError, match=r"`lm_head.weight` differs"):
        import_from_hf(source, tmp_path / "other")


@pytest.mark.parametrize("side", ["theirs", "ours"])
def test_a_tensor_that_no_rule_mentions_or_that_is_missing_is_named(side, save_hf, tmp_path):
    source = save_hf(tmp_path / "theirs")
    if side == "ours":
        import_from_hf(source, tmp_path / "ours")
        source = tmp_path / "ours"
    convert = import_from_hf if side == "theirs" else export_to_hf
    tensors = load_all(source)
    save_file(tensors | {"odd.weight": torch.ones(1)}, source / "model.safetensors")
    with pytest.raises(ConversionError, match=r"holds tensor `odd.weight`"):
        convert(source, tmp_path / "out")
    name = next(name for name in sorted(tensors) if "norm" in name)
    save_file({k: v for k, v in tensors.items() if k != name}, source / "model.safetensors")
    with pytest.raises(ConversionError, match=f"lacks tensor `{name}`"):
        convert(source, tmp_path / "out")
    save_file(tensors | {name: torch.ones(31)}, source / "model.safetensors")
    with pytest.raises(ConversionError, match=f"`{name}`"):
        convert(source, tmp_path / "out")


@pytest.mark.parametrize(
    ("block", "changes", "named"),
    [
        (None, {"m_residual": 0.3}, "m_residual"),
        (None, {"normalization_function": "layernorm"}, "normalization_function"),
        (None, {"position_embedding_type": "nope"}, "position_embedding_type"),
        (None, {"rope_dim": 4}, "rope_dim"),
        (None, {"model_type": "palm"}, "palm"),
        ("sequence_mixer_blocks", {"attention_gate": True}, "attention_gate"),
        ("sequence_mixer_blocks", {"qkv_bias": True}, "qkv_bias"),
        ("sequence_mixer_blocks", {"attention_multiplier": 0.2}, "attention_multiplier"),
        ("sequence_mixer_blocks", {"sequence_mixer_type": "mamba2"}, "mamba2"),
        ("sequence_mixer_blocks", {"sliding_window": 8}, "sliding_window"),
        ("sequence_mixer_blocks", {"qk_norm": True}, "qk_norm"),
        ("mlp_blocks", {"activation_function": "gelu"}, "activation_function"),
        ("mlp_blocks", {"mlp_type": "MoE"}, "MoE"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_llama_cannot_express_is_refused_on_export(block, changes, named, save_hf, tmp_path):
    import_from_hf(save_hf(tmp_path / "theirs"), tmp_path / "ours")
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    (config if block is None else config[block][0]).update(changes)
    (tmp_path / "ours" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConversionError, match=named):
        export_to_hf(tmp_path / "ours", tmp_path / "out", "llama")
    assert not (tmp_path / "out").exists()


def test_one_entry_a_layer_is_exported_like_one_for_all(save_hf, tmp_path):
    source = save_hf(tmp_path / "theirs")
    import_from_hf(source, tmp_path / "ours")
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    config["mlp_blocks"] *= 2
    config["sequence_mixer_blocks"] = [
        block | {"attention_gate": False, "dropout": 0.1}
        for block in config["sequence_mixer_blocks"] * 2
    ]
    # As our own models write it: every field, those that say nothing too.
    config |= {"m_emb": None, "m_width": 1.0, "embedding_dropout": 0.2, "init_method": "normal"}
    (tmp_path / "ours" / "config.json").write_text(json.dumps(config))
    export_to_hf(tmp_path / "ours", tmp_path / "back")
    assert_same_weights(source, tmp_path / "back")
    assert read_config(source) == read_config(tmp_path / "back")
    config["mlp_blocks"] = [{}, {"mlp_type": "MLP"}]
    (tmp_path / "ours" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConversionError, match=r"mlp_blocks\[1\].mlp_type|activation_function"):
        export_to_hf(tmp_path / "ours", tmp_path / "other")
