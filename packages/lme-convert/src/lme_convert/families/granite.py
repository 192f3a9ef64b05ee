"""Granite 3.x, dense: Llama with four multipliers."""

from typing import Any

from lme_convert.families.decoder import (
    DECODER_RULES,
    attention_multiplier,
    drop_plain_head_dim,
    read_attention,
    read_decoder,
    read_mlp,
    uniform,
    write_attention,
    write_decoder,
    write_mlp,
)
from lme_convert.family import Family
from lme_convert.settings import Settings

# Multipliers of the whole model: theirs, ours. 1 is nothing, on both sides.
_MULTIPLIERS = (
    ("embedding_multiplier", "m_emb"),
    ("residual_multiplier", "m_residual"),
    ("logits_scaling", "m_width"),
)


def read_multipliers(theirs: Settings) -> dict[str, Any]:
    """Read the multipliers of the whole model."""
    values = {ours: theirs.number(name, 1.0) for name, ours in _MULTIPLIERS}
    return {name: None if value == 1.0 else value for name, value in values.items()}


def write_multipliers(ours: Settings) -> dict[str, Any]:
    """Write the multipliers of the whole model."""
    return {name: ours.number(of_ours, 1.0) for name, of_ours in _MULTIPLIERS}


def import_config(theirs: Settings) -> dict[str, Any]:
    """Granite's config to ours."""
    mixer = read_attention(theirs) | {
        "add_bias": theirs.boolean("attention_bias", False),
        "attention_multiplier": theirs.number("attention_multiplier", 1.0),
    }
    mlp = read_mlp(theirs) | {"add_bias": theirs.boolean("mlp_bias", False)}
    config = read_decoder(theirs, bos_token_id=1, eos_token_id=2) | read_multipliers(theirs)
    theirs.warn_of_rest()
    return config | {"sequence_mixer_blocks": [mixer], "mlp_blocks": [mlp]}


def export_config(ours: Settings) -> dict[str, Any]:
    """Our config to Granite's."""
    mixer, mlp = uniform(ours, "sequence_mixer_blocks"), uniform(ours, "mlp_blocks")
    config = write_decoder(ours) | write_attention(ours, mixer) | write_mlp(ours, mlp)
    config["attention_bias"] = mixer.boolean("add_bias", False)
    config["mlp_bias"] = mlp.boolean("add_bias", False)
    mixer.expect("qkv_bias", (None, config["attention_bias"]))
    config |= write_multipliers(ours)
    config["attention_multiplier"] = attention_multiplier(mixer, config["head_dim"])
    drop_plain_head_dim(config)
    for settings in (ours, mixer, mlp):
        settings.refuse_rest()
    return config


GRANITE = Family(
    model_type="granite",
    architecture="GraniteForCausalLM",
    import_config=import_config,
    export_config=export_config,
    rules=DECODER_RULES,
)
