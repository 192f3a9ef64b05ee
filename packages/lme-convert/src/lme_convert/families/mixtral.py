"""Mixtral: Mistral with a mixture of experts in every layer."""

from typing import Any

from lme_convert.families.decoder import (
    DECODER_RULES,
    LAYER,
    MLP,
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
    write_aux_loss,
    write_mixture,
)
from lme_convert.family import Family
from lme_convert.rules import rename
from lme_convert.settings import Settings

_EXPERTS, _WIDTH = "num_local_experts", "intermediate_size"


def import_config(theirs: Settings) -> dict[str, Any]:
    """Mixtral's config to ours."""
    theirs.expect("router_jitter_noise", (None, 0))
    window = theirs.optional_integer("sliding_window")
    mixer = read_attention(theirs) | {"add_bias": False, "sliding_window": window}
    mlp = read_mixture(theirs, experts=_EXPERTS, width=_WIDTH)
    config = read_decoder(theirs, bos_token_id=1, eos_token_id=2, rope_theta=1e6, rms_norm_eps=1e-5)
    config |= read_aux_loss(theirs)
    theirs.warn_of_rest()
    return config | {"sequence_mixer_blocks": [mixer], "mlp_blocks": [mlp]}


def export_config(ours: Settings) -> dict[str, Any]:
    """Our config to Mixtral's."""
    mixer, mlp = uniform(ours, "sequence_mixer_blocks"), uniform(ours, "mlp_blocks")
    config = write_decoder(ours) | write_attention(ours, mixer) | write_aux_loss(ours)
    config |= write_mixture(ours, mlp, experts=_EXPERTS, width=_WIDTH)
    config["sliding_window"] = mixer.optional_integer("sliding_window")
    mlp.expect("normalized_topk", (True,), default=True)
    expect_softmax(mlp)
    expect_no_multipliers(ours, mixer, config["head_dim"])
    drop_plain_head_dim(config)
    for settings in (ours, mixer, mlp):
        settings.refuse_rest()
    return config


MIXTRAL = Family(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    import_config=import_config,
    export_config=export_config,
    rules=(
        *DECODER_RULES,
        rename(f"{LAYER}.block_sparse_moe.gate.weight", f"{MLP}.router.weight"),
        *expert_rules("block_sparse_moe.experts.{e}", gate="w1", up="w3", down="w2"),
    ),
)
