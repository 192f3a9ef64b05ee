"""Gemma 3, text: five of six layers with a window and a rotary base of their own."""

from collections.abc import Mapping
from typing import Any

from lme_convert.errors import ConversionError, UnsupportedModelError
from lme_convert.families.decoder import QK_NORM_RULES, one_window, single, uniform
from lme_convert.families.gemma import (
    GEMMA_RULES,
    read_gemma,
    read_gemma_attention,
    read_gemma_mlp,
    read_gemma_windows,
    read_softcap,
    write_gemma,
)
from lme_convert.families.rope import read_rope
from lme_convert.family import Family
from lme_convert.settings import Settings

_FULL, _SLIDING = "full_attention", "sliding_attention"
_THETA, _LOCAL_THETA = 1_000_000.0, 10_000.0
_PATTERN = 6


def import_config(theirs: Settings) -> dict[str, Any]:
    """Gemma 3's config to ours."""
    rope, local = _read_ropes(theirs)
    config = read_gemma(theirs, rope)
    config["logit_softcap"] = read_softcap(theirs, "final_logit_softcapping", None)
    # Their class has the field and does not read it.
    theirs.expect("attn_logit_softcapping", (None,))
    mixer = read_gemma_attention(theirs) | {"qk_norm": True}
    layers, pattern = config["num_layers"], theirs.integer("sliding_window_pattern", _PATTERN)
    theirs.drop(("_sliding_window_pattern",))
    default = [_SLIDING if (i + 1) % pattern else _FULL for i in range(layers)]
    mixers = [
        mixer | {"sliding_window": window, "rope_theta": None if window is None else local}
        for window in read_gemma_windows(theirs, layers, default)
    ]
    mlp = read_gemma_mlp(theirs)
    theirs.warn_of_rest()
    return config | {"sequence_mixer_blocks": single(mixers), "mlp_blocks": [mlp]}


def _read_ropes(theirs: Settings) -> tuple[dict[str, Any], float]:
    """Rotary settings of ours for layers that see everything, and the base of the others."""
    both = _mapping(theirs, "rope_parameters")
    full, sliding = (_mapping(Settings(both, theirs.where), kind) for kind in (_FULL, _SLIDING))
    outer = ("rope_scaling", "max_position_embeddings", "original_max_position_embeddings")
    fields = {name: theirs.value(name) for name in (*outer, "rope_theta")}
    rope = read_rope(Settings(fields | {"rope_parameters": full}, theirs.where), _THETA)
    base = theirs.number("rope_local_base_freq", _LOCAL_THETA)
    local = Settings(sliding, f"{theirs.where} ({_SLIDING})")
    local.expect("rope_type", ("default",), default="default")
    return rope, local.number("rope_theta", base)


def _mapping(settings: Settings, name: str) -> Mapping[str, Any]:
    value = settings.value(name)
    if value is not None and not isinstance(value, dict):
        raise ConversionError(f"`{name}` of {settings.where} must be a mapping, got {value!r}")
    return value or {}


def export_config(ours: Settings) -> dict[str, Any]:
    """Our config to Gemma 3's."""
    by_layer = ("sliding_window", "rope_theta")
    mixer = uniform(ours, "sequence_mixer_blocks", differing=by_layer)
    mlp = uniform(ours, "mlp_blocks")
    config = write_gemma(ours, mixer, mlp)
    entries = ours.entries("sequence_mixer_blocks")
    window, kinds = one_window([entry.get("sliding_window") for entry in entries])
    local = _local_base(entries)
    mixer.drop(by_layer)
    mixer.expect("qk_norm", (True,))
    mixer.expect("qk_norm_across_heads", (None, False))
    config |= {
        "layer_types": kinds,
        "final_logit_softcapping": ours.optional_number("logit_softcap"),
        "rope_local_base_freq": local,
        "rope_parameters": {
            _FULL: config["rope_parameters"],
            _SLIDING: {"rope_type": "default", "rope_theta": local},
        },
    }
    if window is not None:
        config["sliding_window"] = window
    for settings in (ours, mixer, mlp):
        settings.refuse_rest()
    return config


def _local_base(entries: list[dict[str, Any]]) -> float:
    """Rotary base of the layers that have a window, which must be theirs alone."""
    bases = set()
    for layer, entry in enumerate(entries):
        base, window = entry.get("rope_theta"), entry.get("sliding_window")
        if (base is None) != (window is None):
            raise UnsupportedModelError(
                f"`sequence_mixer_blocks[{layer}].rope_theta` is {base!r} with `sliding_window` "
                f"{window!r}; in this family layers with a window, and only they, have a base of "
                "their own"
            )
        if base is not None:
            bases.add(Settings(entry, f"sequence_mixer_blocks[{layer}]").number("rope_theta"))
    if len(bases) > 1:
        raise UnsupportedModelError(
            f"`rope_theta` is {' and '.join(map(str, sorted(bases)))} in different layers; this "
            "family has one for all layers with a window"
        )
    return bases.pop() if bases else _LOCAL_THETA


GEMMA3 = Family(
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    import_config=import_config,
    export_config=export_config,
    rules=(*GEMMA_RULES, *QK_NORM_RULES),
)
