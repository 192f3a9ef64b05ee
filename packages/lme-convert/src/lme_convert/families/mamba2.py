"""Mamba 2: a state space mixer in every layer, and nothing else."""

from types import MappingProxyType
from typing import Any

from lme_convert.families.decoder import OUR_IDLE, uniform
from lme_convert.families.mamba import (
    check_heads,
    mamba_rules,
    read_sizes,
    read_step_limit,
    write_step_limit,
)
from lme_convert.family import Family
from lme_convert.rules import rename
from lme_convert.settings import Settings

_LAYER = "backbone.layers.{i}"
_ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "relu", "tanh")

# Of transformers' base class, of initialisation, and of the dtype of the residual stream.
_IDLE = (
    "_name_or_path",
    "architectures",
    "auto_map",
    "dtype",
    "model_type",
    "rescale_prenorm_residual",
    "residual_in_fp32",
    "time_step_floor",
    "time_step_max",
    "time_step_min",
    "time_step_rank",
    "torch_dtype",
    "transformers_version",
    "use_cache",
)
# Longest sequence that ours states; theirs has no such field, and no limit.
_LENGTH = 2048


def import_config(theirs: Settings) -> dict[str, Any]:
    """Mamba 2's config to ours."""
    theirs.drop(_IDLE)
    theirs.expect("quantization_config", (None,))
    theirs.expect("hidden_act", _ACTIVATIONS, default="silu")
    hidden_size, heads = theirs.integer("hidden_size", 4096), theirs.integer("num_heads", 128)
    width = theirs.integer("expand", 2) * hidden_size
    check_heads(theirs, heads, theirs.integer("head_dim", 64), width)
    mixer = {
        "sequence_mixer_type": "mamba2",
        "state_size": theirs.integer("state_size", 128),
        "intermediate_size": width,
        "num_heads": heads,
        "num_groups": theirs.integer("n_groups", 8),
        "conv_kernel_size": theirs.integer("conv_kernel", 4),
        "chunk_size": theirs.integer("chunk_size", 256),
        "add_bias": theirs.boolean("use_bias", False),
        "use_conv_bias": theirs.boolean("use_conv_bias", True),
        "activation_function": theirs.string("hidden_act", "silu"),
        "normalize_by_group": True,
    }
    limit = read_step_limit(theirs)
    config = {
        "model_type": "gpt_base",
        "vocab_size": theirs.integer("vocab_size", 32768),
        "max_position_embeddings": theirs.integer("max_position_embeddings", _LENGTH),
        "hidden_size": hidden_size,
        "num_layers": theirs.integer("num_hidden_layers", 64),
        "normalization_function": "rmsnorm",
        "layer_norm_epsilon": theirs.number("layer_norm_epsilon", 1e-5),
        "initializer_range": theirs.number("initializer_range", 0.1),
        "bos_token_id": theirs.token_ids("bos_token_id", 0),
        "eos_token_id": theirs.token_ids("eos_token_id", 2),
        "pad_token_id": theirs.token_ids("pad_token_id", 1),
        "position_embedding_type": "nope",
        "tie_word_embeddings": theirs.boolean("tie_word_embeddings", False),
        "sequence_mixer_blocks": [mixer if limit is None else mixer | {"time_step_limit": limit}],
        "mlp_blocks": [{"mlp_type": "none"}],
    }
    theirs.warn_of_rest()
    return config


def export_config(ours: Settings) -> dict[str, Any]:
    """Our config to Mamba 2's."""
    mixer, mlp = uniform(ours, "sequence_mixer_blocks"), uniform(ours, "mlp_blocks")
    sizes = read_sizes(ours, mixer)
    mlp.expect("mlp_type", ("none",))
    mixer.expect("activation_function", _ACTIVATIONS, default="silu")
    ours.expect("normalization_function", ("rmsnorm",))
    ours.expect("norm_placement", ("pre",), default="pre")
    for name in ("m_emb", "m_residual", "m_width"):
        ours.expect(name, (None, 1))
    # A learned table is positions; rotation turns nothing in these layers.
    ours.expect("position_embedding_type", ("nope", "rope"))
    ours.drop((*OUR_IDLE, "max_position_embeddings", "rope_theta", "rope_scaling", "rope_dim"))
    config = {
        "vocab_size": ours.integer("vocab_size"),
        "hidden_size": ours.integer("hidden_size"),
        "num_hidden_layers": ours.integer("num_layers"),
        "layer_norm_epsilon": ours.number("layer_norm_epsilon"),
        "initializer_range": ours.number("initializer_range", 0.02),
        "bos_token_id": ours.token_ids("bos_token_id"),
        "eos_token_id": ours.token_ids("eos_token_id"),
        "pad_token_id": ours.token_ids("pad_token_id"),
        "tie_word_embeddings": ours.boolean("tie_word_embeddings", False),
        "num_heads": sizes["num_heads"],
        "head_dim": sizes["head_dim"],
        "expand": sizes["expand"],
        "state_size": sizes["state_size"],
        "n_groups": sizes["num_groups"],
        "conv_kernel": sizes["conv_kernel_size"],
        "chunk_size": sizes["chunk_size"],
        "use_bias": mixer.boolean("add_bias", False),
        "use_conv_bias": mixer.boolean("use_conv_bias", True),
        "hidden_act": mixer.string("activation_function", "silu"),
        "time_step_limit": write_step_limit(mixer),
    }
    for settings in (ours, mixer, mlp):
        settings.refuse_rest()
    return config


MAMBA2 = Family(
    model_type="mamba2",
    architecture="Mamba2ForCausalLM",
    import_config=import_config,
    export_config=export_config,
    rules=(
        rename("backbone.embeddings.weight", "embedding.weight"),
        rename(f"{_LAYER}.norm.weight", "blocks.{i}.mixer_norm.weight"),
        *mamba_rules(f"{_LAYER}.mixer"),
        rename("backbone.norm_f.weight", "final_norm.weight"),
        rename("lm_head.weight", "lm_head.weight"),
    ),
    tied=MappingProxyType({"lm_head.weight": "backbone.embeddings.weight"}),
)
