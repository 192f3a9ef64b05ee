import json
import logging

import pytest
from pydantic import ValidationError

from lme_core.architectures.gpt_base import GPTBaseConfig
from lme_core.config import FORMAT_VERSION, from_dict, to_dict
from lme_core.layers.rotary import YarnScaling
from lme_core.mixers.softmax_attention import SoftmaxAttentionConfig
from lme_core.mlps.dense import DenseMLPConfig


def test_four_numbers_are_enough():
    config = from_dict(
        {
            "model_type": "gpt_base",
            "vocab_size": 50257,
            "hidden_size": 768,
            "num_layers": 12,
            "sequence_mixer_blocks": [
                {
                    "sequence_mixer_type": "softmax_attention",
                    "num_attention_heads": 12,
                    "num_key_value_heads": 4,
                }
            ],
            "mlp_blocks": [
                {"mlp_type": "MLP", "activation_function": "swiglu", "intermediate_size": 3072}
            ],
        }
    )
    assert isinstance(config, GPTBaseConfig)
    assert config.max_position_embeddings == 2048
    assert config.normalization_function == "rmsnorm"
    assert config.layer_norm_epsilon == 1e-5
    assert config.initializer_range == 0.02
    assert config.position_embedding_type == "rope"
    assert config.rope_theta == 10000
    assert config.tie_word_embeddings is False
    assert config.eos_token_id is None
    # One entry stands for every layer, and the file's form is kept.
    assert len(config.sequence_mixer_blocks) == 1
    assert len(config.mixers()) == len(config.mlps()) == 12
    assert config.mixers()[11].num_key_value_heads == 4


def test_layers_may_differ():
    config = from_dict(
        {
            "hidden_size": 48,
            "num_layers": 2,
            "sequence_mixer_blocks": [
                {"num_attention_heads": 4, "num_key_value_heads": 1},
                {"num_attention_heads": 4, "num_key_value_heads": 4, "sliding_window": 8},
            ],
            "mlp_blocks": [{"intermediate_size": 16}, {"activation_function": "geglu"}],
        }
    )
    assert config.mixers()[1].sliding_window == 8
    assert [mlp.width(48) for mlp in config.mlps()] == [16, 192]


SEED_FIELDS = {
    "model_type": "gpt_base",
    "vocab_size": 100,
    "hidden_size": 64,
    "num_layers": 2,
    "max_position_embeddings": 32,
    "embedding_dropout": 0.1,
    "normalization_function": "layernorm",
    "layer_norm_epsilon": 1e-6,
    "initializer_range": 0.1,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "position_embedding_type": "rope",
    "rope_theta": 300000,
    "rope_scaling": {"factor": 16, "original_max_position_embeddings": 2048},
    "rope_dim": 8,
    "m_emb": 12,
    "m_width": 6,
    "m_residual": 0.22,
    "init_method": "mup",
    "embedding_init_method": "fan_in",
    "use_depth_scaled_init": False,
    "tie_word_embeddings": True,
    "router_aux_loss_coef": None,
    "sequence_mixer_blocks": [
        {
            "sequence_mixer_type": "softmax_attention",
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "softmax_dropout": 0.1,
            "dropout": 0.1,
            "add_bias": True,
            "qkv_bias": False,
            "attention_multiplier": 0.015625,
            "attention_multiplier_method": None,
            "attention_gate": True,
            "exclusive_self_attention": True,
            "sliding_window": None,
        }
    ]
    * 2,
    "mlp_blocks": [
        {
            "mlp_type": "MLP",
            "intermediate_size": 128,
            "activation_function": "swiglu",
            "dropout": 0.1,
            "add_bias": False,
        }
    ]
    * 2,
}


def test_every_field_of_both_vintages_is_read():
    config = from_dict(SEED_FIELDS)
    plain = to_dict(config)
    for name, value in SEED_FIELDS.items():
        if name == "rope_scaling":
            assert config.rope_scaling == YarnScaling(
                factor=16.0, original_max_position_embeddings=2048
            )
        elif name.endswith("_blocks"):
            assert [value[0].items() <= each.items() for each in plain[name]] == [True, True]
        else:
            assert plain[name] == value, name


@pytest.mark.parametrize("settings", [SEED_FIELDS, {}], ids=["full", "empty"])
def test_writing_and_reading_gives_the_same(settings):
    config = from_dict(settings)
    written = json.loads(json.dumps(to_dict(config)))
    assert written["format_version"] == FORMAT_VERSION
    assert from_dict(written) == config


def test_what_transformers_adds_for_itself_is_ignored():
    config = from_dict({"architectures": ["X"], "transformers_version": "5", "hidden_size": 96})
    assert config == GPTBaseConfig(hidden_size=96)


def test_an_empty_mapping_and_objects_made_by_hand_are_configs():
    assert from_dict({}) == GPTBaseConfig()
    config = GPTBaseConfig(
        hidden_size=48,
        num_layers=1,
        sequence_mixer_blocks=(SoftmaxAttentionConfig(num_attention_heads=4),),
        mlp_blocks=(DenseMLPConfig(),),
    )
    assert from_dict(to_dict(config)) == config
    assert hash(config) == hash(from_dict(to_dict(config)))


def test_use_cache_is_accepted_with_a_warning(caplog):
    with caplog.at_level(logging.WARNING):
        from_dict({"use_cache": True})
    assert "use_cache" in caplog.text


ATTENTION = {"num_attention_heads": 12, "num_key_value_heads": 4}
WRONG = {
    "unknown key": ({"hiden_size": 3}, "hiden_size"),
    "unknown key of a mixer": ({"sequence_mixer_blocks": [{"heads": 3}]}, r"blocks\.0.*heads"),
    "unknown key of an mlp": ({"mlp_blocks": [{"width": 3}]}, r"blocks\.0.*width"),
    "unknown architecture": ({"model_type": "gpt"}, "gpt_base"),
    "unknown mixer": ({"sequence_mixer_blocks": [{"sequence_mixer_type": "x"}]}, "softmax_atten"),
    "unknown mlp": ({"mlp_blocks": [{"mlp_type": "x"}]}, "MLP"),
    "a mixer that is no mapping": ({"sequence_mixer_blocks": ["x"]}, "sequence_mixer_blocks"),
    "activation": ({"mlp_blocks": [{"activation_function": "swish_gl"}]}, "did you mean"),
    "norm": ({"normalization_function": "batchnorm"}, "rmsnorm"),
    "positions": ({"position_embedding_type": "alibi"}, "learned_absolute"),
    "heads": (
        {"sequence_mixer_blocks": [{"num_attention_heads": 12, "num_key_value_heads": 5}]},
        "multiple of `num_key_value_heads`, got 12 and 5",
    ),
    "heads and width": (
        {"hidden_size": 100, "sequence_mixer_blocks": [ATTENTION]},
        r"sequence_mixer_blocks\[0\].*`num_attention_heads` \(12\) must divide `hidden_size`",
    ),
    "number of mixers": (
        {"num_layers": 3, "sequence_mixer_blocks": [ATTENTION] * 2},
        r"`sequence_mixer_blocks` must have 1 entry.*`num_layers` \(3\) entries, got 2",
    ),
    "number of mlps": ({"num_layers": 3, "mlp_blocks": [{}] * 4}, "`mlp_blocks`.*got 4"),
    "no mixers": ({"sequence_mixer_blocks": []}, "`sequence_mixer_blocks`.*got 0"),
    "odd rotation": ({"rope_dim": 3}, "`rope_dim` must be even and at least 2, got 3"),
    "odd head": (
        {"sequence_mixer_blocks": [ATTENTION | {"head_dim": 9}]},
        "`rope_dim` must be even.*set `rope_dim` or `head_dim`",
    ),
    "wide rotation": (
        {"rope_dim": 128},
        r"`rope_dim` \(128\) must be at most the head size \(64\)",
    ),
    "two head sizes": (
        {
            "num_layers": 2,
            "sequence_mixer_blocks": [ATTENTION, ATTENTION | {"head_dim": 32}],
        },
        "`rope_dim` must be given when layers differ.*32, 64",
    ),
    "token id": ({"vocab_size": 10, "eos_token_id": 10}, r"`eos_token_id`.*`vocab_size` \(10\)"),
    "dropout": ({"embedding_dropout": 1}, "`embedding_dropout`"),
    "mup without width": ({"init_method": "mup"}, "needs `m_width`"),
    "multiplier": ({"m_residual": 0}, "`m_residual` must be above 0, got 0"),
    "layers": ({"num_layers": 0}, "`num_layers` must be at least 1, got 0"),
    "p": ({"p_norm_order": 0.5}, "`p_norm_order` must be at least 1"),
    "a newer file": ({"format_version": 99}, "`format_version` must be 0 or 1, got 99"),
    "a broken number": ({"num_layers": 1.5}, "num_layers"),
}


@pytest.mark.parametrize(("settings", "message"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_named(settings, message):
    with pytest.raises(ValueError, match=f"(?s){message}") as caught:
        from_dict(settings)
    if isinstance(caught.value, ValidationError):
        assert caught.value.error_count() == 1
