"""What the Llama-like families share: names of tensors, and the fields of both configs."""

from collections.abc import Mapping, Sequence
from typing import Any

from lme_convert.errors import ConversionError, UnsupportedModelError
from lme_convert.families.rope import read_rope, write_rope
from lme_convert.rules import GroupedQKV, Interleave, Rule, rename
from lme_convert.settings import Settings

MIXER = "blocks.{i}.sequence_mixer"
MLP = "blocks.{i}.mlp"
LAYER = "model.layers.{i}"

# What layers that attend have, and others have not.
_HEADS = "num_attention_heads"


def _attention_rules(kind: str) -> tuple[Rule, ...]:
    projections = tuple(f"{LAYER}.self_attn.{name}_proj.{kind}" for name in ("q", "k", "v"))
    return (
        Rule(projections, (f"{MIXER}.qkv.{kind}",), GroupedQKV(), given=_HEADS),
        Rule((f"{LAYER}.self_attn.o_proj.{kind}",), (f"{MIXER}.output.{kind}",), given=_HEADS),
    )


def _mlp_rules(kind: str) -> tuple[Rule, ...]:
    projections = tuple(f"{LAYER}.mlp.{name}_proj.{kind}" for name in ("gate", "up"))
    return (
        Rule(projections, (f"{MLP}.gate_up.{kind}",), Interleave()),
        rename(f"{LAYER}.mlp.down_proj.{kind}", f"{MLP}.down.{kind}"),
    )


DECODER_RULES = (
    rename("model.embed_tokens.weight", "embedding.weight"),
    rename(f"{LAYER}.input_layernorm.weight", "blocks.{i}.mixer_norm.weight"),
    *_attention_rules("weight"),
    *_attention_rules("bias"),
    rename(f"{LAYER}.post_attention_layernorm.weight", "blocks.{i}.mlp_norm.weight"),
    *_mlp_rules("weight"),
    *_mlp_rules("bias"),
    rename("model.norm.weight", "final_norm.weight"),
    rename("lm_head.weight", "lm_head.weight"),
)
"""Embedding, pre-norm attention and gated MLP, norm, head; biases where the model has them."""

QK_NORM_RULES = (
    rename(f"{LAYER}.self_attn.q_norm.weight", f"{MIXER}.query_norm.weight"),
    rename(f"{LAYER}.self_attn.k_norm.weight", f"{MIXER}.key_norm.weight"),
)
"""Norms of each head's query and key."""

_ACTIVATIONS = {
    "silu": "swiglu",
    "gelu": "geglu",
    "gelu_pytorch_tanh": "gelu_pytorch_tanh_glu",
    "relu": "reglu",
}

# Other names of ours for the same functions.
_ALIASES = {
    "silu_glu": "swiglu",
    "swish_glu": "swiglu",
    "gelu_glu": "geglu",
    "relu_glu": "reglu",
}

# Of transformers' base class; they change no number of the forward pass.
_THEIR_IDLE = (
    "_attn_implementation_autoset",
    "_name_or_path",
    "architectures",
    "auto_map",
    "dtype",
    "model_type",
    "pretraining_tp",
    "rope_interleaved",
    "torch_dtype",
    "transformers_version",
    "use_cache",
)

OUR_IDLE = (
    "architectures",
    "embedding_dropout",
    "embedding_init_method",
    "format_version",
    "init_method",
    "model_type",
    "p_norm_order",
    "rope_channels",
    "router_aux_loss_coef",
    "router_z_loss_coef",
    "use_cache",
    "use_depth_scaled_init",
)
"""Initialisation, dropout and losses of ours, which no file of theirs holds."""


def read_decoder(
    theirs: Settings,
    *,
    bos_token_id: int | None = None,
    eos_token_id: int | None = None,
    rope_theta: float = 10000.0,
    rms_norm_eps: float = 1e-6,
    rope: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Read what all these families call alike; blocks are added by the family.

    Args:
        theirs: Their settings.
        bos_token_id: What their class takes where a file has no such field.
        eos_token_id: The same.
        rope_theta: The same.
        rms_norm_eps: The same.
        rope: Rotary settings of ours where the family has read them itself.

    Raises:
        ConversionError: If a field is missing or malformed.
    """
    theirs.drop(_THEIR_IDLE)
    theirs.expect("quantization_config", (None,))
    theirs.expect("is_encoder_decoder", (False, None))
    theirs.expect("add_cross_attention", (False, None))
    return {
        "model_type": "gpt_base",
        "vocab_size": theirs.integer("vocab_size"),
        "max_position_embeddings": theirs.integer("max_position_embeddings"),
        "hidden_size": theirs.integer("hidden_size"),
        "num_layers": theirs.integer("num_hidden_layers"),
        "normalization_function": "rmsnorm",
        "layer_norm_epsilon": theirs.number("rms_norm_eps", rms_norm_eps),
        "initializer_range": theirs.number("initializer_range", 0.02),
        "bos_token_id": theirs.token_ids("bos_token_id", bos_token_id),
        "eos_token_id": theirs.token_ids("eos_token_id", eos_token_id),
        "pad_token_id": theirs.token_ids("pad_token_id"),
        "position_embedding_type": "rope",
        **(read_rope(theirs, rope_theta) if rope is None else rope),
        "tie_word_embeddings": theirs.boolean("tie_word_embeddings", False),
    }


def read_attention(theirs: Settings) -> dict[str, Any]:
    """Read heads and dropout of softmax attention.

    Raises:
        ConversionError: If a field is missing or malformed, or the heads do not divide.
    """
    heads = theirs.integer("num_attention_heads")
    groups = theirs.integer("num_key_value_heads", heads)
    hidden_size = theirs.integer("hidden_size")
    head_dim = theirs.optional_integer("head_dim")
    if heads % groups or (head_dim is None and hidden_size % heads):
        raise ConversionError(
            f"`num_attention_heads` is {heads} in the config of {theirs.where}; it must be a "
            f"multiple of `num_key_value_heads` ({groups}) and, without `head_dim`, divide "
            f"`hidden_size` ({hidden_size})"
        )
    return {
        "sequence_mixer_type": "softmax_attention",
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": hidden_size // heads if head_dim is None else head_dim,
        "softmax_dropout": theirs.number("attention_dropout", 0.0),
    }


def read_mlp(theirs: Settings) -> dict[str, Any]:
    """Read width and activation of a gated MLP.

    Raises:
        UnsupportedModelError: For an activation whose gated form we do not have.
        ConversionError: If a field is missing or malformed.
    """
    return {
        "mlp_type": "MLP",
        "activation_function": read_activation(theirs),
        "intermediate_size": theirs.integer("intermediate_size"),
    }


def read_activation(theirs: Settings, name: str = "hidden_act", default: str = "silu") -> str:
    """Read the activation of gated MLPs.

    Args:
        theirs: Their settings.
        name: Their name of the field.
        default: What their class takes where a file has no such field.

    Raises:
        UnsupportedModelError: For one whose gated form we do not have.
    """
    theirs.expect(name, _ACTIVATIONS, default=default)
    return _ACTIVATIONS[theirs.string(name, default)]


def write_activation(mlp: Settings) -> str:
    """Write the activation of a gated MLP.

    Raises:
        UnsupportedModelError: For an MLP that is not gated, or gated by another function.
    """
    theirs_of = {ours: theirs for theirs, ours in _ACTIVATIONS.items()}
    mlp.expect("activation_function", (*theirs_of, *_ALIASES))
    activation = mlp.string("activation_function")
    return theirs_of[_ALIASES.get(activation, activation)]


def write_decoder(
    ours: Settings,
    *,
    norm_placement: str = "pre",
    positions: tuple[str, ...] = ("rope",),
) -> dict[str, Any]:
    """Write what all these families call alike.

    Args:
        ours: Our settings.
        norm_placement: Where the family normalises.
        positions: Kinds of positions that it has.

    Raises:
        UnsupportedModelError: If the model has parts that they lack.
        ConversionError: If a field is missing or malformed.
    """
    ours.drop(OUR_IDLE)
    ours.expect("normalization_function", ("rmsnorm",))
    ours.expect("position_embedding_type", positions)
    ours.expect("norm_placement", (norm_placement,), default="pre")
    length = ours.integer("max_position_embeddings")
    return {
        "vocab_size": ours.integer("vocab_size"),
        "max_position_embeddings": length,
        "hidden_size": ours.integer("hidden_size"),
        "num_hidden_layers": ours.integer("num_layers"),
        "rms_norm_eps": ours.number("layer_norm_epsilon"),
        "initializer_range": ours.number("initializer_range", 0.02),
        "bos_token_id": ours.token_ids("bos_token_id"),
        "eos_token_id": ours.token_ids("eos_token_id"),
        "pad_token_id": ours.token_ids("pad_token_id"),
        **write_rope(ours, length),
        "tie_word_embeddings": ours.boolean("tie_word_embeddings", False),
    }


def write_attention(
    ours: Settings, mixer: Settings, *, partial_rotary: bool = False
) -> dict[str, Any]:
    """Write heads and dropout of softmax attention.

    Args:
        ours: Our settings.
        mixer: A block of ours.
        partial_rotary: Whether the family may rotate some channels only, and looks at `rope_dim`.

    Raises:
        UnsupportedModelError: For another mixer, or one that rotates part of its channels.
        ConversionError: If a field is missing or malformed.
    """
    mixer.expect("sequence_mixer_type", ("softmax_attention",), default="softmax_attention")
    mixer.drop(("dropout",))
    heads = mixer.integer("num_attention_heads")
    head_dim = mixer.integer("head_dim", ours.integer("hidden_size") // heads)
    if not partial_rotary:
        ours.expect("rope_dim", (None, head_dim))
    return {
        "num_attention_heads": heads,
        "num_key_value_heads": mixer.integer("num_key_value_heads"),
        "head_dim": head_dim,
        "attention_dropout": mixer.number("softmax_dropout", 0.0),
    }


def drop_plain_head_dim(config: dict[str, Any]) -> None:
    """Leave out a `head_dim` that says nothing new: some classes read it only where a file has it.

    Args:
        config: Theirs, changed in place.
    """
    if config["head_dim"] * config["num_attention_heads"] == config["hidden_size"]:
        del config["head_dim"]


def attention_multiplier(mixer: Settings, head_dim: int) -> float:
    """Factor of query times key that a block of ours asks for, given or by formula."""
    mixer.expect("attention_multiplier_method", (None, "1 / sqrt(head_dim)", "1 / head_dim"))
    inverse = mixer.value("attention_multiplier_method") == "1 / head_dim"
    return mixer.number("attention_multiplier", 1.0 / head_dim if inverse else head_dim**-0.5)


def expect_no_multipliers(ours: Settings, mixer: Settings, head_dim: int) -> None:
    """Refuse multipliers, of which a Llama has none but 1 / sqrt(head_dim) of query times key.

    Raises:
        UnsupportedModelError: Naming the setting and its value.
    """
    for name in ("m_emb", "m_residual", "m_width"):
        ours.expect(name, (None, 1))
    factor = attention_multiplier(mixer, head_dim)
    if factor != head_dim**-0.5:
        raise UnsupportedModelError(
            f"`attention_multiplier` amounts to {factor} in {mixer.where}; this family always has "
            f"1 / sqrt(head_dim) = {head_dim**-0.5}"
        )


def write_mlp(ours: Settings, mlp: Settings) -> dict[str, Any]:
    """Write width and activation of a gated MLP.

    Raises:
        UnsupportedModelError: For an MLP that is not gated, or gated by another function.
        ConversionError: If a field is missing or malformed.
    """
    mlp.expect("mlp_type", ("MLP",), default="MLP")
    mlp.drop(("dropout",))
    return {
        "hidden_act": write_activation(mlp),
        "intermediate_size": mlp.integer("intermediate_size", 4 * ours.integer("hidden_size")),
    }


def read_windows(theirs: Settings, num_layers: int) -> list[int | None]:
    """Read the sliding window of each layer, in the Qwen families' spelling.

    Returns:
        Tokens that a token sees, itself among them, or `None` for all; one entry a layer.

    Raises:
        UnsupportedModelError: For a kind of layer that is neither full nor sliding.
        ConversionError: If a field is malformed.
    """
    used = theirs.boolean("use_sliding_window", False)
    # Some classes write 0 for a window that is not used.
    window = theirs.optional_integer("sliding_window", minimum=1 if used else 0)
    first = theirs.integer("max_window_layers", 28, minimum=0)
    window = window if used else None
    kinds = read_kinds(theirs, num_layers, ("full_attention", "sliding_attention"))
    if kinds is None:
        return [window if layer >= first else None for layer in range(num_layers)]
    return [window if kind == "sliding_attention" else None for kind in kinds]


def read_kinds(theirs: Settings, num_layers: int, known: tuple[str, ...]) -> list[str] | None:
    """Read the kind of each layer; absent or null is `None`.

    Args:
        theirs: Their settings.
        num_layers: Number of layers.
        known: Kinds that the family can have.

    Raises:
        UnsupportedModelError: For another kind.
        ConversionError: If the field is malformed.
    """
    kinds = theirs.value("layer_types")
    if kinds is None:
        return None
    if not isinstance(kinds, list) or len(kinds) != num_layers:
        raise ConversionError(f"`layer_types` must have `num_hidden_layers` = {num_layers} entries")
    for layer, kind in enumerate(kinds):
        if kind not in known:
            raise UnsupportedModelError(
                f"`layer_types[{layer}]` is {kind!r} in the config of {theirs.where}; only "
                f"{' and '.join(known)} can be converted exactly"
            )
    return kinds


def write_windows(ours: Settings) -> dict[str, Any]:
    """Write the sliding window of each layer, in the Qwen families' spelling.

    Raises:
        UnsupportedModelError: If layers have windows of different lengths.
    """
    entries = ours.entries("sequence_mixer_blocks")
    window, kinds = one_window([entry.get("sliding_window") for entry in entries])
    return {
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "layer_types": kinds,
    }


def one_window(windows: Sequence[int | None]) -> tuple[int | None, list[str]]:
    """Say what window layers have and which have it.

    Args:
        windows: Tokens that a token sees, itself among them, or `None` for all; one entry a layer.

    Returns:
        The window, `None` where no layer has one, and `layer_types` of theirs.

    Raises:
        UnsupportedModelError: If layers have windows of different lengths.
    """
    lengths = sorted({window for window in windows if window is not None})
    if len(lengths) > 1:
        raise UnsupportedModelError(
            f"`sliding_window` is {' and '.join(map(str, lengths))} in different layers; this "
            "family has one length"
        )
    kinds = ["full_attention" if window is None else "sliding_attention" for window in windows]
    return lengths[0] if lengths else None, kinds


def uniform(
    ours: Settings,
    name: str,
    *,
    differing: tuple[str, ...] = (),
    layers: Sequence[int] | None = None,
) -> Settings:
    """The one block that stands for all layers, or for some.

    Args:
        ours: Our settings.
        name: `sequence_mixer_blocks` or `mlp_blocks`.
        differing: Fields in which layers may differ; those of the first are kept.
        layers: Layers that are looked at, at least one; `None` is all.

    Raises:
        UnsupportedModelError: If layers differ elsewhere.
    """
    entries = ours.entries(name)
    layers = range(len(entries)) if layers is None else layers
    first = entries[layers[0]]
    for layer in layers:
        entry = entries[layer]
        for key in sorted({*entry, *first} - set(differing)):
            if entry.get(key) != first.get(key):
                raise UnsupportedModelError(
                    f"`{name}[{layer}].{key}` is {entry.get(key)!r} but {first.get(key)!r} in "
                    f"layer {layers[0]}; this family has one setting for all such layers"
                )
    return Settings(first, f"{name}[{layers[0]}]")


def single(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One entry where all layers are alike, else one a layer."""
    return entries[:1] if all(entry == entries[0] for entry in entries) else entries
