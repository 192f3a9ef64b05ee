"""Llama 1 to 3.x, dense, and what calls itself so."""

from typing import Any

from lme_convert.errors import UnsupportedModelError
from lme_convert.families.decoder import (
    DECODER_RULES,
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
from lme_convert.settings import Settings


def import_config(theirs: Settings) -> dict[str, Any]:
    """Llama's config to ours."""
    mixer = read_attention(theirs) | {"add_bias": theirs.boolean("attention_bias", False)}
    mlp = read_mlp(theirs) | {"add_bias": theirs.boolean("mlp_bias", False)}
    config = read_decoder(theirs, bos_token_id=1, eos_token_id=2) | {
        "sequence_mixer_blocks": [mixer],
        "mlp_blocks": [mlp],
    }
    theirs.warn_of_rest()
    return config


def export_config(ours: Settings) -> dict[str, Any]:
    """Our config to Llama's."""
    mixer, mlp = uniform(ours, "sequence_mixer_blocks"), uniform(ours, "mlp_blocks")
    config = write_decoder(ours) | write_attention(ours, mixer) | write_mlp(ours, mlp)
    config["attention_bias"] = mixer.boolean("add_bias", False)
    config["mlp_bias"] = mlp.boolean("add_bias", False)
    mixer.expect("qkv_bias", (None, config["attention_bias"]))
    expect_no_multipliers(ours, mixer, config["head_dim"])
    if config["hidden_size"] % config["num_attention_heads"]:
        raise UnsupportedModelError(
            f"`num_attention_heads` is {config['num_attention_heads']}; a Llama's must divide "
            f"`hidden_size` ({config['hidden_size']})"
        )
    for settings in (ours, mixer, mlp):
        settings.refuse_rest()
    return config


LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    import_config=import_config,
    export_config=export_config,
    rules=DECODER_RULES,
)
