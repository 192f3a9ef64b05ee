"""Granite 3.x with a mixture of experts in every layer."""

from typing import Any

from lme_convert.families.decoder import (
    DECODER_RULES,
    attention_multiplier,
    drop_plain_head_dim,
    read_attention,
    read_decoder,
    uniform,
    write_attention,
    write_decoder,
)
from lme_convert.families.granite import read_multipliers, write_multipliers
from lme_convert.families.mixture import (
    PACKED_RULES,
    expect_softmax,
    read_aux_loss,
    read_mixture,
    write_aux_loss,
    write_mixture,
)
from lme_convert.family import Family
from lme_convert.settings import Settings

_EXPERTS, _WIDTH = "num_local_experts", "intermediate_size"


def read_granite_mixture(theirs: Settings) -> dict[str, Any]:
    """Read all but a shared expert; unread fields are the family's to warn of."""
    mixer = read_attention(theirs) | {
        "add_bias": theirs.boolean("attention_bias", False),
        "attention_multiplier": theirs.number("attention_multiplier", 1.0),
    }
    mlp = read_mixture(theirs, experts=_EXPERTS, width=_WIDTH)
    config = read_decoder(theirs, bos_token_id=1, eos_token_id=2)
    config |= read_multipliers(theirs) | read_aux_loss(theirs)
    return config | {"sequence_mixer_blocks": [mixer], "mlp_blocks": [mlp]}


def write_granite_mixture(ours: Settings, mlp: Settings) -> dict[str, Any]:
    """Write all but a shared expert; fields of `mlp` not read are the family's to refuse.

    Raises:
        UnsupportedModelError: If the model has parts that they lack.
        ConversionError: If a field is missing or malformed.
    """
    mixer = uniform(ours, "sequence_mixer_blocks")
    config = write_decoder(ours) | write_attention(ours, mixer) | write_multipliers(ours)
    config |= write_mixture(ours, mlp, experts=_EXPERTS, width=_WIDTH) | write_aux_loss(ours)
    mlp.expect("normalized_topk", (True,), default=True)
    expect_softmax(mlp)
    config["attention_bias"] = mixer.boolean("add_bias", False)
    mixer.expect("qkv_bias", (None, config["attention_bias"]))
    config["attention_multiplier"] = attention_multiplier(mixer, config["head_dim"])
    drop_plain_head_dim(config)
    for settings in (ours, mixer):
        settings.refuse_rest()
    return config


def import_config(theirs: Settings) -> dict[str, Any]:
    """Granite's config to ours."""
    config = read_granite_mixture(theirs)
    theirs.warn_of_rest()
    return config


def export_config(ours: Settings) -> dict[str, Any]:
    """Our config to Granite's."""
    mlp = uniform(ours, "mlp_blocks")
    config = write_granite_mixture(ours, mlp)
    mlp.refuse_rest()
    return config


GRANITE_MOE = Family(
    model_type="granitemoe",
    architecture="GraniteMoeForCausalLM",
    import_config=import_config,
    export_config=export_config,
    rules=(*DECODER_RULES, *PACKED_RULES),
)
