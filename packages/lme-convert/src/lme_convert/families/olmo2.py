"""OLMo 2: norms after mixer and MLP, queries and keys normalised over all heads together."""

from typing import Any

from lme_convert.families.decoder import (
    DECODER_RULES,
    LAYER,
    QK_NORM_RULES,
    drop_plain_head_dim,
    expect_no_multipliers,
    read_attention,
    read_decoder,
    read_mlp,
    uniform,
    write_attention,
    write_decoder,
    write_mlp,
)
from lme_convert.family import Family
from lme_convert.rules import rename
from lme_convert.settings import Settings


def import_config(theirs: Settings) -> dict[str, Any]:
    """OLMo 2's config to ours."""
    config = read_decoder(theirs, eos_token_id=50279, rms_norm_eps=1e-5) | {
        "pad_token_id": theirs.token_ids("pad_token_id", 1),
        "norm_placement": "post",
    }
    mixer = read_attention(theirs) | {
        "add_bias": theirs.boolean("attention_bias", False),
        "qk_norm": True,
        "qk_norm_across_heads": True,
    }
    mlp = read_mlp(theirs) | {"add_bias": False}
    theirs.warn_of_rest()
    return config | {"sequence_mixer_blocks": [mixer], "mlp_blocks": [mlp]}


def export_config(ours: Settings) -> dict[str, Any]:
    """Our config to OLMo 2's."""
    mixer, mlp = uniform(ours, "sequence_mixer_blocks"), uniform(ours, "mlp_blocks")
    config = write_decoder(ours, norm_placement="post")
    config |= write_attention(ours, mixer) | write_mlp(ours, mlp)
    config["attention_bias"] = mixer.boolean("add_bias", False)
    mixer.expect("qkv_bias", (None, config["attention_bias"]))
    mixer.expect("qk_norm", (True,))
    mixer.expect("qk_norm_across_heads", (True,))
    expect_no_multipliers(ours, mixer, config["head_dim"])
    drop_plain_head_dim(config)
    for settings in (ours, mixer, mlp):
        settings.refuse_rest()
    return config


OLMO2 = Family(
    model_type="olmo2",
    architecture="Olmo2ForCausalLM",
    import_config=import_config,
    export_config=export_config,
    rules=(
        *(rule for rule in DECODER_RULES if "_norm" not in rule.ours[0] or "final" in rule.ours[0]),
        *QK_NORM_RULES,
        rename(f"{LAYER}.post_attention_layernorm.weight", "blocks.{i}.mixer_output_norm.weight"),
        rename(f"{LAYER}.post_feedforward_layernorm.weight", "blocks.{i}.mlp_output_norm.weight"),
    ),
)
