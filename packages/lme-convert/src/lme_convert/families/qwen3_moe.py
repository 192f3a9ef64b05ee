"""Qwen 3 with mixtures of experts: queries and keys normalised per head, no shared expert."""

from typing import Any

from lme_convert.families.decoder import (
    DECODER_RULES,
    LAYER,
    MLP,
    QK_NORM_RULES,
    drop_plain_head_dim,
    expect_no_multipliers,
    read_attention,
    read_decoder,
    uniform,
    write_attention,
    write_decoder,
)
from lme_convert.families.mixture import (
    expect_softmax,
    expert_rules,
    read_aux_loss,
    read_mixture,
    read_some_dense,
    write_aux_loss,
    write_some_dense,
)
from lme_convert.family import Family
from lme_convert.rules import rename
from lme_convert.settings import Settings

_EXPERTS, _WIDTH = "num_experts", "moe_intermediate_size"


def import_config(theirs: Settings) -> dict[str, Any]:
    """Qwen 3's config to ours."""
    config = read_decoder(theirs) | read_aux_loss(theirs)
    used = theirs.boolean("use_sliding_window", False)
    window = theirs.optional_integer("sliding_window", minimum=1 if used else 0)
    # Read by no class of theirs: a window is every layer's.
    theirs.drop(("max_window_layers",))
    mixer = read_attention(theirs) | {
        "add_bias": theirs.boolean("attention_bias", False),
        "qk_norm": True,
        "sliding_window": window if used else None,
    }
    # Newer files have the other name.
    newer = theirs.optional_integer("num_local_experts") is not None
    mixture = read_mixture(
        theirs, experts="num_local_experts" if newer else _EXPERTS, width=_WIDTH
    ) | {"normalized_topk": theirs.boolean("norm_topk_prob", False)}
    mlps = read_some_dense(theirs, mixture, config["num_layers"])
    theirs.warn_of_rest()
    return config | {"sequence_mixer_blocks": [mixer], "mlp_blocks": mlps}


def export_config(ours: Settings) -> dict[str, Any]:
    """Our config to Qwen 3's."""
    mixer = uniform(ours, "sequence_mixer_blocks")
    config = write_decoder(ours) | write_attention(ours, mixer)
    of_mlps, mlp, dense = write_some_dense(ours, experts=_EXPERTS, width=_WIDTH)
    config |= of_mlps | write_aux_loss(ours)
    config |= {"decoder_sparse_step": 1, "mlp_only_layers": dense}
    config["norm_topk_prob"] = mlp.boolean("normalized_topk", True)
    expect_softmax(mlp)
    config["sliding_window"] = mixer.optional_integer("sliding_window")
    config["use_sliding_window"] = config["sliding_window"] is not None
    mixer.expect("qk_norm", (True,))
    config["attention_bias"] = mixer.boolean("add_bias", False)
    mixer.expect("qkv_bias", (None, config["attention_bias"]))
    expect_no_multipliers(ours, mixer, config["head_dim"])
    drop_plain_head_dim(config)
    for settings in (ours, mixer, mlp):
        settings.refuse_rest()
    return config


QWEN3_MOE = Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    import_config=import_config,
    export_config=export_config,
    rules=(
        *DECODER_RULES,
        *QK_NORM_RULES,
        rename(f"{LAYER}.mlp.gate.weight", f"{MLP}.router.weight"),
        *expert_rules("mlp.experts.{e}", gate="gate_proj", up="up_proj", down="down_proj"),
    ),
)
