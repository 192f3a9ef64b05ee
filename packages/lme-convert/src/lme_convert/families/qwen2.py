"""Qwen 2 and 2.5, dense: Llama with biases of query, key and value; windows in some layers."""

from typing import Any

from lme_convert.families.decoder import (
    DECODER_RULES,
    drop_plain_head_dim,
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


def import_config(theirs: Settings) -> dict[str, Any]:
    """Qwen 2's config to ours."""
    config = read_decoder(theirs)
    mixer = read_attention(theirs) | {"add_bias": False, "qkv_bias": True}
    windows = read_windows(theirs, config["num_layers"])
    mixers = [mixer | {"sliding_window": window} for window in windows]
    mlp = read_mlp(theirs) | {"add_bias": False}
    theirs.warn_of_rest()
    return config | {"sequence_mixer_blocks": single(mixers), "mlp_blocks": [mlp]}


def export_config(ours: Settings) -> dict[str, Any]:
    """Our config to Qwen 2's."""
    mixer = uniform(ours, "sequence_mixer_blocks", differing=("sliding_window",))
    mlp = uniform(ours, "mlp_blocks")
    config = write_decoder(ours) | write_attention(ours, mixer) | write_mlp(ours, mlp)
    config |= write_windows(ours)
    mixer.drop(("sliding_window",))
    mixer.expect("qkv_bias", (True,))
    expect_no_multipliers(ours, mixer, config["head_dim"])
    drop_plain_head_dim(config)
    for settings in (ours, mixer, mlp):
        settings.refuse_rest()
    return config


QWEN2 = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    import_config=import_config,
    export_config=export_config,
    rules=DECODER_RULES,
)
