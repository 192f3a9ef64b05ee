"""Qwen 1.5 and 2 with mixtures of experts, and a gated expert that serves every token."""

from typing import Any

from lme_convert.errors import UnsupportedModelError
from lme_convert.families.decoder import (
    DECODER_RULES,
    LAYER,
    MLP,
    drop_plain_head_dim,
    expect_no_multipliers,
    read_attention,
    read_decoder,
    read_windows,
    single,
    uniform,
    write_attention,
    write_decoder,
    write_windows,
)
from lme_convert.families.mixture import (
    expect_softmax,
    expert_rules,
    read_aux_loss,
    read_mixture,
    read_some_dense,
    shared_rules,
    write_aux_loss,
    write_some_dense,
)
from lme_convert.family import Family
from lme_convert.rules import rename
from lme_convert.settings import Settings

_EXPERTS, _WIDTH = "num_experts", "moe_intermediate_size"


def import_config(theirs: Settings) -> dict[str, Any]:
    """Qwen 2's config to ours."""
    config = read_decoder(theirs) | read_aux_loss(theirs)
    if theirs.boolean("use_sliding_window", False) and theirs.value("layer_types") is None:
        raise UnsupportedModelError(
            f"`use_sliding_window` is true in the config of {theirs.where}, whose classes have "
            "differed about which layers that means; `layer_types` must say it"
        )
    mixer = read_attention(theirs) | {
        "add_bias": False,
        "qkv_bias": theirs.boolean("qkv_bias", True),
    }
    windows = read_windows(theirs, config["num_layers"])
    mixers = [mixer | {"sliding_window": window} for window in windows]
    mixture = read_mixture(theirs, experts=_EXPERTS, width=_WIDTH) | {
        "normalized_topk": theirs.boolean("norm_topk_prob", False),
        "shared_intermediate_size": theirs.integer("shared_expert_intermediate_size"),
        "shared_expert_gating": True,
    }
    mlps = read_some_dense(theirs, mixture, config["num_layers"])
    theirs.warn_of_rest()
    return config | {"sequence_mixer_blocks": single(mixers), "mlp_blocks": mlps}


def export_config(ours: Settings) -> dict[str, Any]:
    """Our config to Qwen 2's."""
    mixer = uniform(ours, "sequence_mixer_blocks", differing=("sliding_window",))
    config = write_decoder(ours) | write_attention(ours, mixer)
    of_mlps, mlp, dense = write_some_dense(ours, experts=_EXPERTS, width=_WIDTH)
    config |= of_mlps | write_windows(ours) | write_aux_loss(ours)
    config |= {"decoder_sparse_step": 1, "mlp_only_layers": dense}
    config["norm_topk_prob"] = mlp.boolean("normalized_topk", True)
    mlp.expect("shared_expert_gating", (True,))
    config["shared_expert_intermediate_size"] = mlp.integer("shared_intermediate_size")
    expect_softmax(mlp)
    mixer.drop(("sliding_window",))
    config["qkv_bias"] = mixer.boolean("qkv_bias", False)
    expect_no_multipliers(ours, mixer, config["head_dim"])
    drop_plain_head_dim(config)
    for settings in (ours, mixer, mlp):
        settings.refuse_rest()
    return config


QWEN2_MOE = Family(
    model_type="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    import_config=import_config,
    export_config=export_config,
    rules=(
        *DECODER_RULES,
        rename(f"{LAYER}.mlp.gate.weight", f"{MLP}.router.weight"),
        *expert_rules("mlp.experts.{e}", gate="gate_proj", up="up_proj", down="down_proj"),
        *shared_rules("mlp.shared_expert"),
        rename(f"{LAYER}.mlp.shared_expert_gate.weight", f"{MLP}.shared_gate.weight"),
    ),
)
