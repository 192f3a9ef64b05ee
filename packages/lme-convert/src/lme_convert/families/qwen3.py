"""Qwen 3, dense: queries and keys normalised per head; windows in some layers."""

from typing import Any

from lme_convert.families.decoder import (
    DECODER_RULES,
    QK_NORM_RULES,
    expect_no_multipliers,
    read_attention,
    read_decoder,
    read_mlp,
    read_windows,
    single,
    uniform,
    write_attention,
    write_decoder,
    write_mlp,
    write_windows,
)
from lme_convert.family import Family
from lme_convert.settings import Settings

# Their class's own, whatever the hidden size.
_HEAD_DIM = 128


def import_config(theirs: Settings) -> dict[str, Any]:
    """Qwen 3's config to ours."""
    config = read_decoder(theirs)
    mixer = read_attention(theirs) | {
        "head_dim": theirs.integer("head_dim", _HEAD_DIM),
        "add_bias": theirs.boolean("attention_bias", False),
        "qk_norm": True,
    }
    windows = read_windows(theirs, config["num_layers"])
    mixers = [mixer | {"sliding_window": window} for window in windows]
    mlp = read_mlp(theirs) | {"add_bias": False}
    theirs.warn_of_rest()
    return config | {"sequence_mixer_blocks": single(mixers), "mlp_blocks": [mlp]}


def export_config(ours: Settings) -> dict[str, Any]:
    """Our config to Qwen 3's."""
    mixer = uniform(ours, "sequence_mixer_blocks", differing=("sliding_window",))
    mlp = uniform(ours, "mlp_blocks")
    config = write_decoder(ours) | write_attention(ours, mixer) | write_mlp(ours, mlp)
    config |= write_windows(ours)
    mixer.drop(("sliding_window",))
    mixer.expect("qk_norm", (True,))
    config["attention_bias"] = mixer.boolean("add_bias", False)
    mixer.expect("qkv_bias", (None, config["attention_bias"]))
    expect_no_multipliers(ours, mixer, config["head_dim"])
    for settings in (ours, mixer, mlp):
        settings.refuse_rest()
    return config


QWEN3 = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    import_config=import_config,
    export_config=export_config,
    rules=(*DECODER_RULES, *QK_NORM_RULES),
)
