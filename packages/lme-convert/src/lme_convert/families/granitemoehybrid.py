"""Granite 4: layers of Mamba 2 and of attention, dense or with mixtures of experts."""

from typing import Any

from lme_convert.errors import UnsupportedModelError
from lme_convert.families.decoder import (
    DECODER_RULES,
    LAYER,
    MLP,
    attention_multiplier,
    drop_plain_head_dim,
    read_activation,
    read_attention,
    read_decoder,
    read_kinds,
    single,
    uniform,
    write_activation,
    write_attention,
    write_decoder,
)
from lme_convert.families.granite import read_multipliers, write_multipliers
from lme_convert.families.mamba import (
    check_heads,
    mamba_rules,
    read_sizes,
    read_step_limit,
    write_step_limit,
)
from lme_convert.families.mixture import (
    PACKED_RULES,
    PACKED_SHARED_RULES,
    expect_softmax,
    read_aux_loss,
    read_mixture,
    write_aux_loss,
    write_mixture,
)
from lme_convert.family import Family
from lme_convert.rules import Alternate, Rule, rename
from lme_convert.settings import Settings

_EXPERTS, _WIDTH, _SHARED = "num_local_experts", "intermediate_size", "shared_intermediate_size"
# transformers 4 has the first two names, 5 the others and reads both.
_RECURRENT = ("mamba", "linear_attention")
_KINDS = (*_RECURRENT, "attention", "full_attention")
_OF_ATTENTION = (
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "attention_bias",
    "attention_dropout",
    "attention_multiplier",
)


def import_config(theirs: Settings) -> dict[str, Any]:
    """Granite's config to ours."""
    config = read_decoder(theirs, bos_token_id=1, eos_token_id=2)
    config |= read_multipliers(theirs) | read_aux_loss(theirs)
    theirs.expect("position_embedding_type", (None, "nope", "rope"))
    rotates = theirs.value("position_embedding_type") == "rope"
    config["position_embedding_type"] = "rope" if rotates else "nope"
    layers = config["num_layers"]
    kinds = read_kinds(theirs, layers, _KINDS) or [_RECURRENT[0]] * layers
    mamba = _read_mamba(theirs, config["hidden_size"])
    attention: dict[str, Any] = {}
    if any(kind not in _RECURRENT for kind in kinds):
        attention = read_attention(theirs) | {
            "add_bias": theirs.boolean("attention_bias", False),
            "attention_multiplier": theirs.number("attention_multiplier", 1.0),
        }
    theirs.drop(_OF_ATTENTION)
    mixers = [mamba if kind in _RECURRENT else attention for kind in kinds]
    mlp = _read_mlp(theirs)
    theirs.warn_of_rest()
    return config | {"sequence_mixer_blocks": single(mixers), "mlp_blocks": [mlp]}


def _read_mamba(theirs: Settings, hidden_size: int) -> dict[str, Any]:
    width = theirs.integer("mamba_expand", 2) * hidden_size
    heads = theirs.integer("mamba_n_heads", 128)
    if theirs.value("mamba_d_head", "auto") != "auto":
        check_heads(theirs, heads, theirs.integer("mamba_d_head"), width)
    mixer = {
        "sequence_mixer_type": "mamba2",
        "state_size": theirs.integer("mamba_d_state", 256),
        "intermediate_size": width,
        "num_heads": heads,
        "num_groups": theirs.integer("mamba_n_groups", 1),
        "conv_kernel_size": theirs.integer("mamba_d_conv", 4),
        "chunk_size": theirs.integer("mamba_chunk_size", 256),
        "add_bias": theirs.boolean("mamba_proj_bias", False),
        "use_conv_bias": theirs.boolean("mamba_conv_bias", True),
        "activation_function": theirs.string("hidden_act", "silu"),
        "normalize_by_group": True,
    }
    limit = read_step_limit(theirs)
    return mixer if limit is None else mixer | {"time_step_limit": limit}


def _read_mlp(theirs: Settings) -> dict[str, Any]:
    shared = theirs.integer(_SHARED, 1024)
    if theirs.integer(_EXPERTS, 8, minimum=0):
        return read_mixture(theirs, experts=_EXPERTS, width=_WIDTH) | {_SHARED: shared}
    theirs.drop((_WIDTH, "num_experts_per_tok", "output_router_logits"))
    return {
        "mlp_type": "MLP",
        "activation_function": read_activation(theirs),
        "intermediate_size": shared,
        "add_bias": False,
    }


def export_config(ours: Settings) -> dict[str, Any]:
    """Our config to Granite's."""
    config = write_decoder(ours, positions=("rope", "nope"))
    config["position_embedding_type"] = ours.string("position_embedding_type", "rope")
    config |= write_multipliers(ours) | write_aux_loss(ours) | _write_mlp(ours)
    kinds = [
        entry.get("sequence_mixer_type") == "mamba2"
        for entry in ours.entries("sequence_mixer_blocks")
    ]
    config["layer_types"] = ["mamba" if recurrent else "attention" for recurrent in kinds]
    config |= _write_mamba(ours, [i for i, recurrent in enumerate(kinds) if recurrent], config)
    attending = [i for i, recurrent in enumerate(kinds) if not recurrent]
    if attending:
        mixer = uniform(ours, "sequence_mixer_blocks", layers=attending)
        config |= write_attention(ours, mixer)
        config["attention_bias"] = mixer.boolean("add_bias", False)
        mixer.expect("qkv_bias", (None, config["attention_bias"]))
        config["attention_multiplier"] = attention_multiplier(mixer, config["head_dim"])
        drop_plain_head_dim(config)
        mixer.refuse_rest()
    ours.refuse_rest()
    return config


def _write_mamba(ours: Settings, layers: list[int], config: dict[str, Any]) -> dict[str, Any]:
    if not layers:
        # Nothing reads these, but their class checks that they fit.
        return {"mamba_expand": 1, "mamba_n_heads": 1, "mamba_d_head": config["hidden_size"]}
    mixer = uniform(ours, "sequence_mixer_blocks", layers=layers)
    sizes = read_sizes(ours, mixer)
    mixer.expect("activation_function", (config["hidden_act"],), default="silu")
    written = {
        "mamba_expand": sizes["expand"],
        "mamba_n_heads": sizes["num_heads"],
        "mamba_d_head": sizes["head_dim"],
        "mamba_n_groups": sizes["num_groups"],
        "mamba_d_state": sizes["state_size"],
        "mamba_d_conv": sizes["conv_kernel_size"],
        "mamba_chunk_size": sizes["chunk_size"],
        "mamba_proj_bias": mixer.boolean("add_bias", False),
        "mamba_conv_bias": mixer.boolean("use_conv_bias", True),
        "time_step_limit": write_step_limit(mixer),
    }
    mixer.refuse_rest()
    return written


def _write_mlp(ours: Settings) -> dict[str, Any]:
    mlp = uniform(ours, "mlp_blocks")
    if mlp.string("mlp_type", "MLP") == "MoE":
        config = write_mixture(ours, mlp, experts=_EXPERTS, width=_WIDTH)
        mlp.expect("normalized_topk", (True,), default=True)
        expect_softmax(mlp)
        shared = mlp.optional_integer(_SHARED)
        if shared is None:
            raise UnsupportedModelError(
                f"`{_SHARED}` is absent in {mlp.where}; this family has an MLP that serves every "
                "token"
            )
        config[_SHARED] = shared
    else:
        mlp.expect("mlp_type", ("MLP",), default="MLP")
        mlp.drop(("dropout",))
        width = mlp.integer("intermediate_size", 4 * ours.integer("hidden_size"))
        config = {
            "hidden_act": write_activation(mlp),
            _EXPERTS: 0,
            "num_experts_per_tok": 0,
            _WIDTH: width,
            _SHARED: width,
        }
    mlp.refuse_rest()
    return config


GRANITE_MOE_HYBRID = Family(
    model_type="granitemoehybrid",
    architecture="GraniteMoeHybridForCausalLM",
    import_config=import_config,
    export_config=export_config,
    rules=(
        *(rule for rule in DECODER_RULES if f"{MLP}." not in rule.ours[0]),
        *mamba_rules(f"{LAYER}.mamba"),
        *PACKED_RULES,
        *PACKED_SHARED_RULES,
        # Without experts the MLP that serves every token is the MLP.
        Rule((f"{LAYER}.shared_mlp.input_linear.weight",), (f"{MLP}.gate_up.weight",), Alternate()),
        rename(f"{LAYER}.shared_mlp.output_linear.weight", f"{MLP}.down.weight"),
    ),
)
