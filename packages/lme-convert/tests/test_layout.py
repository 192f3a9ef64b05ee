import pytest

from lme_convert.errors import ConversionError, UnsupportedModelError
from lme_convert.families import expected_parameters

SMALL = {"model_type": "gpt_base", "vocab_size": 11, "hidden_size": 24, "num_layers": 1}


def test_a_config_of_four_numbers_means_the_usual_model():
    """12 query heads of 2 channels, 1 key-value head, an MLP without gate, four times as wide."""
    assert expected_parameters(SMALL) == {
        "embedding.weight": (11, 24),
        "blocks.0.mixer_norm.weight": (24,),
        "blocks.0.sequence_mixer.qkv.weight": (28, 24),
        "blocks.0.sequence_mixer.output.weight": (24, 24),
        "blocks.0.mlp_norm.weight": (24,),
        "blocks.0.mlp.up.weight": (96, 24),
        "blocks.0.mlp.down.weight": (24, 96),
        "final_norm.weight": (24,),
        "lm_head.weight": (11, 24),
    }


def test_every_option_that_adds_a_tensor_adds_it():
    config = SMALL | {
        "normalization_function": "layernorm",
        "position_embedding_type": "learned_absolute",
        "max_position_embeddings": 50,
        "tie_word_embeddings": True,
        "sequence_mixer_blocks": [
            {
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "head_dim": 5,
                "add_bias": True,
                "qkv_bias": False,
                "attention_gate": True,
                "qk_norm": True,
            }
        ],
        "mlp_blocks": [{"activation_function": "swiglu", "intermediate_size": 7, "add_bias": True}],
    }
    assert expected_parameters(config) == {
        "embedding.weight": (11, 24),
        "position_embedding.weight": (50, 24),
        "blocks.0.mixer_norm.weight": (24,),
        "blocks.0.mixer_norm.bias": (24,),
        # 4 queries, 2 keys, 2 values and 4 gates of 5 channels.
        "blocks.0.sequence_mixer.qkv.weight": (60, 24),
        "blocks.0.sequence_mixer.query_norm.weight": (5,),
        "blocks.0.sequence_mixer.key_norm.weight": (5,),
        "blocks.0.sequence_mixer.output.weight": (24, 20),
        "blocks.0.sequence_mixer.output.bias": (24,),
        "blocks.0.mlp_norm.weight": (24,),
        "blocks.0.mlp_norm.bias": (24,),
        "blocks.0.mlp.gate_up.weight": (14, 24),
        "blocks.0.mlp.gate_up.bias": (14,),
        "blocks.0.mlp.down.weight": (24, 7),
        "blocks.0.mlp.down.bias": (24,),
        "final_norm.weight": (24,),
        "final_norm.bias": (24,),
    }


def test_a_mixture_has_a_router_experts_and_what_serves_every_token():
    mlp = {
        "mlp_type": "MoE",
        "activation_function": "swiglu",
        "intermediate_size": 7,
        "num_experts": 5,
        "add_bias": True,
        "shared_intermediate_size": 9,
        "shared_expert_gating": True,
        "expert_bias_update_rate": 0.0,
    }
    shapes = expected_parameters(SMALL | {"mlp_blocks": [mlp]})
    assert {name: shape for name, shape in shapes.items() if ".mlp." in name} == {
        "blocks.0.mlp.router.weight": (5, 24),
        "blocks.0.mlp.router.selection_bias": (5,),
        "blocks.0.mlp.experts.gate_up.weight": (5, 14, 24),
        "blocks.0.mlp.experts.gate_up.bias": (5, 14),
        "blocks.0.mlp.experts.down.weight": (5, 24, 7),
        "blocks.0.mlp.experts.down.bias": (5, 24),
        "blocks.0.mlp.shared.gate_up.weight": (18, 24),
        "blocks.0.mlp.shared.gate_up.bias": (18,),
        "blocks.0.mlp.shared.down.weight": (24, 9),
        "blocks.0.mlp.shared.down.bias": (24,),
        "blocks.0.mlp.shared_gate.weight": (1, 24),
    }


def test_the_usual_mixture_has_eight_experts_without_gate():
    shapes = expected_parameters(SMALL | {"mlp_blocks": [{"mlp_type": "MoE"}]})
    assert shapes["blocks.0.mlp.experts.up.weight"] == (8, 96, 24)
    assert shapes["blocks.0.mlp.router.weight"] == (8, 24)
    assert "blocks.0.mlp.router.selection_bias" not in shapes


@pytest.mark.parametrize("is_shared", [True, False])
def test_latent_attention_has_its_projections(is_shared):
    mixer = {
        "sequence_mixer_type": "multihead_latent_attention",
        "num_attention_heads": 3,
        "head_dim": 4,
        "query_compression_size": 5 if is_shared else None,
        "key_value_compression_size": 6,
        "share_compression": is_shared,
        "rope_head_dim": 2,
        "value_head_dim": 8 if is_shared else None,
        "normalization_function": "rmsnorm" if is_shared else "layernorm",
    }
    shapes = expected_parameters(SMALL | {"sequence_mixer_blocks": [mixer]})
    at = "blocks.0.sequence_mixer"
    shapes = {name: shape for name, shape in shapes.items() if at in name}
    if is_shared:
        expected = {
            f"{at}.query_down.weight": (5, 24),
            f"{at}.query_norm.weight": (5,),
            f"{at}.query_up.weight": (18, 5),
            f"{at}.key_value_down.weight": (8, 24),
            f"{at}.key_value_norm.weight": (6,),
            f"{at}.value_up.weight": (24, 6),
            f"{at}.output.weight": (24, 24),
        }
    else:
        expected = {
            f"{at}.query_up.weight": (18, 24),
            f"{at}.key_value_down.weight": (14, 24),
            f"{at}.key_value_norm.weight": (12,),
            f"{at}.key_value_norm.bias": (12,),
            f"{at}.value_up.weight": (12, 6),
            f"{at}.output.weight": (24, 12),
        }
    assert shapes == expected | {f"{at}.key_up.weight": (12, 6)}


def test_layers_may_differ():
    mlps = [
        {"activation_function": "swiglu", "intermediate_size": 7},
        {"activation_function": "relu", "intermediate_size": 9},
    ]
    shapes = expected_parameters(SMALL | {"num_layers": 2, "mlp_blocks": mlps})
    assert shapes["blocks.0.mlp.gate_up.weight"] == (14, 24)
    assert shapes["blocks.1.mlp.up.weight"] == (9, 24)
    assert "blocks.1.mlp.gate_up.weight" not in shapes


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"model_type": "palm"}, UnsupportedModelError, "palm"),
        (
            {"sequence_mixer_blocks": [{"sequence_mixer_type": "gru"}]},
            UnsupportedModelError,
            "gru",
        ),
        ({"mlp_blocks": [{"mlp_type": "LSTM"}]}, UnsupportedModelError, "LSTM"),
        (
            {"mlp_blocks": [{"activation_function": "preglu"}]},
            UnsupportedModelError,
            "preglu has a weight",
        ),
        ({"num_layers": 3, "mlp_blocks": [{}, {}]}, ConversionError, "1 or `num_layers` = 3"),
        ({"num_layers": 10**9}, ConversionError, "at most"),
        ({"num_layers": None}, ConversionError, "`num_layers` must be an integer"),
        ({"hidden_size": 0}, ConversionError, "`hidden_size` must be an integer"),
        ({"hidden_size": True}, ConversionError, "`hidden_size` must be an integer"),
        ({"mlp_blocks": {}}, ConversionError, "`mlp_blocks` must be a list of mappings"),
        (
            {"sequence_mixer_blocks": [{"num_key_value_heads": 5}]},
            ConversionError,
            "multiple of `num_key_value_heads`",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_does_not_make_a_model_is_named(changes, error, match):
    with pytest.raises(error, match=match):
        expected_parameters(SMALL | changes)
