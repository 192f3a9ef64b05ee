"""DeepSeek-V3: latent attention, some dense layers, then mixtures chosen among groups."""

from typing import Any

from lme_convert.errors import UnsupportedModelError
from lme_convert.families.decoder import (
    DECODER_RULES,
    LAYER,
    MLP,
    read_decoder,
    read_mlp,
    single,
    uniform,
    write_decoder,
)
from lme_convert.families.latent_attention import (
    LATENT_RULES,
    read_latent_attention,
    write_latent_attention,
)
from lme_convert.families.mixture import (
    expert_rules,
    read_mixture,
    shared_rules,
    write_some_dense,
)
from lme_convert.family import Family
from lme_convert.rules import rename
from lme_convert.settings import Settings

_EXPERTS, _WIDTH = "n_routed_experts", "moe_intermediate_size"

# Of training, of several devices, and the number of modules that predict further tokens: their
# tensors, where a file has any, are named and refused.
_IDLE = ("aux_loss_alpha", "ep_size", "num_mtp_layers", "num_nextn_predict_layers", "seq_aux")


def import_config(theirs: Settings) -> dict[str, Any]:
    """DeepSeek-V3's config to ours."""
    theirs.drop(_IDLE)
    # What remote code of the same name can do besides.
    theirs.expect("scoring_func", (None, "sigmoid"))
    theirs.expect("topk_method", (None, "noaux_tc"))
    theirs.expect("moe_layer_freq", (None, 1))
    config = read_decoder(theirs, bos_token_id=0, eos_token_id=1)
    mixer = read_latent_attention(theirs, config["rope_scaling"])
    mixture = read_mixture(theirs, experts=_EXPERTS, width=_WIDTH)
    mixture |= {
        "normalized_topk": theirs.boolean("norm_topk_prob", True),
        "shared_intermediate_size": theirs.integer("n_shared_experts", 1)
        * mixture["intermediate_size"],
        "router_score_function": "sigmoid",
        "routed_scaling_factor": theirs.number("routed_scaling_factor", 2.5),
        "num_expert_groups": theirs.integer("n_group", 8),
        "num_groups_per_tok": theirs.integer("topk_group", 4),
        # There is a bias, and it stays as it is until somebody wants it to move.
        "expert_bias_update_rate": 0.0,
    }
    layers = config["num_layers"]
    first = min(theirs.integer("first_k_dense_replace", 3, minimum=0), layers)
    dense = read_mlp(theirs) | {"add_bias": False}
    theirs.warn_of_rest()
    return config | {
        "router_aux_loss_coef": None,
        "sequence_mixer_blocks": [mixer],
        "mlp_blocks": single([dense] * first + [mixture] * (layers - first)),
    }


def export_config(ours: Settings) -> dict[str, Any]:
    """Our config to DeepSeek-V3's."""
    mixer = uniform(ours, "sequence_mixer_blocks")
    config = write_decoder(ours)
    of_mlps, mlp, dense = write_some_dense(ours, experts=_EXPERTS, width=_WIDTH)
    if dense != list(range(len(dense))):
        raise UnsupportedModelError(
            f"`mlp_type` is 'MLP' in layers {dense}; this family has dense layers first"
        )
    config |= of_mlps | write_latent_attention(ours, mixer, config["rope_scaling"])
    mlp.expect("router_score_function", ("sigmoid",), default="softmax")
    shared, width = mlp.optional_integer("shared_intermediate_size"), config[_WIDTH]
    if shared is None or shared % width:
        raise UnsupportedModelError(
            f"`shared_intermediate_size` is {shared}; this family's is a multiple of an expert's "
            f"`intermediate_size` ({width})"
        )
    if mlp.optional_number("expert_bias_update_rate") is None:
        raise UnsupportedModelError(
            "`expert_bias_update_rate` is absent; this family's routers have a bias for choosing"
        )
    for name in ("m_emb", "m_residual", "m_width"):
        ours.expect(name, (None, 1))
    config |= {
        "first_k_dense_replace": len(dense),
        "n_shared_experts": shared // width,
        "n_group": mlp.integer("num_expert_groups", 1),
        "topk_group": mlp.integer("num_groups_per_tok", 1),
        "norm_topk_prob": mlp.boolean("normalized_topk", True),
        "routed_scaling_factor": mlp.number("routed_scaling_factor", 1.0),
        "num_nextn_predict_layers": 0,
    }
    for settings in (ours, mixer, mlp):
        settings.refuse_rest()
    return config


DEEPSEEK_V3 = Family(
    model_type="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    import_config=import_config,
    export_config=export_config,
    rules=(
        *(rule for rule in DECODER_RULES if "sequence_mixer" not in rule.ours[0]),
        *LATENT_RULES,
        rename(f"{LAYER}.mlp.gate.weight", f"{MLP}.router.weight"),
        rename(f"{LAYER}.mlp.gate.e_score_correction_bias", f"{MLP}.router.selection_bias"),
        *expert_rules("mlp.experts.{e}", gate="gate_proj", up="up_proj", down="down_proj"),
        *shared_rules("mlp.shared_experts"),
    ),
)
