"""Families with mixtures of experts: there and back, where tensors lie, what is refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

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
