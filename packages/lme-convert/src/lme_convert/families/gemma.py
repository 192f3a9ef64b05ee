"""What Gemma 2 and 3 share: norms around mixer and MLP, windows by layer, bounded logits."""

from collections.abc import Mapping, Sequence
from typing import Any

from lme_convert.errors import ConversionError, UnsupportedModelError
from lme_convert.families.decoder import (
    DECODER_RULES,
    LAYER,
    attention_multiplier,
    read_activation,
    read_attention,
    read_decoder,
    read_kinds,
    write_attention,
    write_decoder,
    write_mlp,
)
from lme_convert.rules import rename
from lme_convert.settings import Settings

_ACTIVATION = "gelu_pytorch_tanh"
_HEAD_DIM, _KEY_VALUE_HEADS, _SCALAR, _WINDOW = 256, 4, 256, 4096

GEMMA_RULES = (
    *(rule for rule in DECODER_RULES if "mlp_norm" not in rule.ours[0]),
    rename(f"{LAYER}.post_attention_layernorm.weight", "blocks.{i}.mixer_output_norm.weight"),
    rename(f"{LAYER}.pre_feedforward_layernorm.weight", "blocks.{i}.mlp_norm.weight"),
    rename(f"{LAYER}.post_feedforward_layernorm.weight", "blocks.{i}.mlp_output_norm.weight"),
)
"""Those of a Llama, with norms before and after mixer and MLP."""


def read_gemma(theirs: Settings, rope: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Read what both call alike, without blocks.

    Args:
        theirs: Their settings.
        rope: Rotary settings of ours where the family has read them itself.

    Raises:
        UnsupportedModelError: If tokens see those after them.
        ConversionError: If a field is missing or malformed.
    """
    theirs.expect("use_bidirectional_attention", (None, False))
    # Read by no class of theirs: the other name of the activation, and a switch of the cache.
    theirs.drop(("hidden_act", "cache_implementation"))
    config = read_decoder(theirs, bos_token_id=2, eos_token_id=1, rope=rope)
    return config | {
        "pad_token_id": theirs.token_ids("pad_token_id", 0),
        "tie_word_embeddings": theirs.boolean("tie_word_embeddings", True),
        "norm_placement": "sandwich",
        "zero_centered_norms": True,
        "m_emb": config["hidden_size"] ** 0.5,
    }


def read_gemma_attention(theirs: Settings) -> dict[str, Any]:
    """Read attention without its window.

    Raises:
        ConversionError: If a field is missing or malformed.
    """
    scalar = theirs.number("query_pre_attn_scalar", _SCALAR)
    if scalar <= 0:
        raise ConversionError(f"`query_pre_attn_scalar` must be above 0, got {scalar}")
    return read_attention(theirs) | {
        "num_key_value_heads": theirs.integer("num_key_value_heads", _KEY_VALUE_HEADS),
        "head_dim": theirs.integer("head_dim", _HEAD_DIM),
        "add_bias": theirs.boolean("attention_bias", False),
        "attention_multiplier": scalar**-0.5,
    }


def read_gemma_mlp(theirs: Settings) -> dict[str, Any]:
    """Read the MLP.

    Raises:
        UnsupportedModelError: For an activation whose gated form we do not have.
        ConversionError: If a field is missing or malformed.
    """
    return {
        "mlp_type": "MLP",
        "activation_function": read_activation(theirs, "hidden_activation", _ACTIVATION),
        "intermediate_size": theirs.integer("intermediate_size"),
        "add_bias": False,
    }


def read_gemma_windows(
    theirs: Settings, num_layers: int, default: Sequence[str]
) -> list[int | None]:
    """Read the sliding window of each layer.

    Args:
        theirs: Their settings.
        num_layers: Number of layers.
        default: Kinds of the layers where a file does not say them.

    Returns:
        Tokens that a token sees, itself among them, or `None` for all; one entry a layer.

    Raises:
        UnsupportedModelError: For a kind of layer that is neither full nor sliding.
        ConversionError: If a field is malformed.
    """
    window = _WINDOW if is_absent(theirs, "sliding_window") else theirs.integer("sliding_window")
    known = ("full_attention", "sliding_attention")
    kinds = read_kinds(theirs, num_layers, known) or default
    return [window if kind == "sliding_attention" else None for kind in kinds]


def read_softcap(theirs: Settings, name: str, default: float | None) -> float | None:
    """Read a bound; null is none, and an absent field what their class takes."""
    return default if is_absent(theirs, name) else theirs.optional_number(name)


def is_absent(theirs: Settings, name: str) -> bool:
    """Say whether a file has no such field, which need not mean what null means."""
    return theirs.value(name, "absent") == "absent"


def write_gemma(ours: Settings, mixer: Settings, mlp: Settings) -> dict[str, Any]:
    """Write what both call alike, without windows and bounds.

    Args:
        ours: Our settings.
        mixer: A block of ours.
        mlp: A block of ours.

    Raises:
        UnsupportedModelError: If the model has parts or numbers that theirs lacks.
        ConversionError: If a field is missing or malformed.
    """
    config = write_decoder(ours, norm_placement="sandwich")
    config |= write_attention(ours, mixer) | write_mlp(ours, mlp)
    ours.expect("zero_centered_norms", (True,), default=False)
    ours.expect("m_emb", (config["hidden_size"] ** 0.5,))
    for name in ("m_residual", "m_width"):
        ours.expect(name, (None, 1))
    config["hidden_activation"] = config.pop("hidden_act")
    config["attention_bias"] = mixer.boolean("add_bias", False)
    mixer.expect("qkv_bias", (None, config["attention_bias"]))
    factor = attention_multiplier(mixer, config["head_dim"])
    scalar = round(factor**-2) if factor > 0 else 0
    if scalar < 1 or scalar**-0.5 != factor:
        raise UnsupportedModelError(
            f"`attention_multiplier` amounts to {factor} in {mixer.where}; this family's is one "
            "over the square root of an integer"
        )
    return config | {"query_pre_attn_scalar": scalar, "use_bidirectional_attention": False}
