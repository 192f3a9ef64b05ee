"""Gemma 2: every other layer with a window, scores and logits bounded."""

from typing import Any

from lme_convert.families.decoder import one_window, single, uniform
from lme_convert.families.gemma import (
    GEMMA_RULES,
    read_gemma,
    read_gemma_attention,
    read_gemma_mlp,
    read_gemma_windows,
    read_softcap,
    write_gemma,
)
from lme_convert.family import Family
from lme_convert.settings import Settings

_SCORES, _LOGITS = 50.0, 30.0


def import_config(theirs: Settings) -> dict[str, Any]:
    """Gemma 2's config to ours."""
    config = read_gemma(theirs)
    config["logit_softcap"] = read_softcap(theirs, "final_logit_softcapping", _LOGITS)
    mixer = read_gemma_attention(theirs) | {
        "attention_softcap": read_softcap(theirs, "attn_logit_softcapping", _SCORES)
    }
    layers = config["num_layers"]
    default = ["full_attention" if i % 2 else "sliding_attention" for i in range(layers)]
    windows = read_gemma_windows(theirs, layers, default)
    mixers = [mixer | {"sliding_window": window} for window in windows]
    mlp = read_gemma_mlp(theirs)
    theirs.warn_of_rest()
    return config | {"sequence_mixer_blocks": single(mixers), "mlp_blocks": [mlp]}


def export_config(ours: Settings) -> dict[str, Any]:
    """Our config to Gemma 2's."""
    mixer = uniform(ours, "sequence_mixer_blocks", differing=("sliding_window",))
    mlp = uniform(ours, "mlp_blocks")
    config = write_gemma(ours, mixer, mlp)
    entries = ours.entries("sequence_mixer_blocks")
    window, kinds = one_window([entry.get("sliding_window") for entry in entries])
    mixer.drop(("sliding_window",))
    config |= {
        "layer_types": kinds,
        "final_logit_softcapping": ours.optional_number("logit_softcap"),
        "attn_logit_softcapping": mixer.optional_number("attention_softcap"),
    }
    if window is not None:
        config["sliding_window"] = window
    for settings in (ours, mixer, mlp):
        settings.refuse_rest()
    return config


GEMMA2 = Family(
    model_type="gemma2",
    architecture="Gemma2ForCausalLM",
    import_config=import_config,
    export_config=export_config,
    rules=GEMMA_RULES,
)
