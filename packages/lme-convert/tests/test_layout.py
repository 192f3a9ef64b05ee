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
        ({"mlp_blocks": [{"mlp_type": "MoE"}]}, UnsupportedModelError, "MoE"),
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
