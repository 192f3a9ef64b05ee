"""Mistral, dense: Llama without biases, with one sliding window for all layers."""

from typing import Any

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
    """Mistral's config to ours."""
    # Absent is not null here: their class has a window unless a file says null.
    absent = theirs.value("sliding_window", "absent") == "absent"
    window = 4096 if absent else theirs.optional_integer("sliding_window")
    theirs.expect("layer_types", (None,))
    mixer = read_attention(theirs) | {"add_bias": False, "sliding_window": window}
    mlp = read_mlp(theirs) | {"add_bias": False}
    config = read_decoder(theirs, bos_token_id=1, eos_token_id=2) | {
        "sequence_mixer_blocks": [mixer],
        "mlp_blocks": [mlp],
    }
    theirs.warn_of_rest()
    return config


def export_config(ours: Settings) -> dict[str, Any]:
    """Our config to Mistral's."""
    mixer, mlp = uniform(ours, "sequence_mixer_blocks"), uniform(ours, "mlp_blocks")
    config = write_decoder(ours) | write_attention(ours, mixer) | write_mlp(ours, mlp)
    config["sliding_window"] = mixer.optional_integer("sliding_window")
    expect_no_multipliers(ours, mixer, config["head_dim"])
    for settings in (ours, mixer, mlp):
        settings.refuse_rest()
    return config


MISTRAL = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    import_config=import_config,
    export_config=export_config,
    rules=DECODER_RULES,
)
