"""Multi-head latent attention as DeepSeek stores it: rules, and the fields of both configs."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lme_convert.errors import UnsupportedModelError
from lme_convert.families.decoder import LAYER, MIXER
from lme_convert.rules import Alternate, Rule, Sizes, rename
from lme_convert.settings import Settings

# Theirs, of the norms of compressed channels, whatever the config says of the others.
_EPSILON = 1e-6


@dataclass(frozen=True, slots=True)
class SplitHeads:
    """One tensor of theirs, rows by head [part, part, ...], in one tensor of ours a part."""

    parts: tuple[str, ...]
    """Rows of each part in a head: names in `Sizes`."""

    def to_ours(self, tensors: Sequence[Tensor], sizes: Sizes) -> list[Tensor]:
        (tensor,) = tensors
        heads = tensor.unflatten(0, (sizes["num_attention_heads"], -1))
        split = heads.split([sizes[part] for part in self.parts], dim=1)
        return [part.flatten(0, 1) for part in split]

    def to_theirs(self, tensors: Sequence[Tensor], sizes: Sizes) -> list[Tensor]:
        heads = [tensor.unflatten(0, (sizes["num_attention_heads"], -1)) for tensor in tensors]
        return [torch.cat(heads, dim=1).flatten(0, 1)]


@dataclass(frozen=True, slots=True)
class SortPairs:
    """The last `rope_head_dim` rows, which rotate: pairs beside each other to pairs of halves."""

    by_head: bool = False
    """Whether they are the last of each head, not of the tensor."""

    def to_ours(self, tensors: Sequence[Tensor], sizes: Sizes) -> list[Tensor]:
        return [self._sorted(tensor, sizes, is_ours=False) for tensor in tensors]

    def to_theirs(self, tensors: Sequence[Tensor], sizes: Sizes) -> list[Tensor]:
        return [self._sorted(tensor, sizes, is_ours=True) for tensor in tensors]

    def _sorted(self, tensor: Tensor, sizes: Sizes, *, is_ours: bool) -> Tensor:
        heads = sizes["num_attention_heads"] if self.by_head else 1
        grouped = tensor.unflatten(0, (heads, -1))
        rotating = sizes["rope_head_dim"]
        stays, turns = grouped.split([grouped.shape[1] - rotating, rotating], dim=1)
        # Of ours, two runs of rows; taken in turn they are theirs.
        alternate = Alternate(dim=1)
        (turns,) = (
            alternate.to_ours([turns], sizes) if is_ours else alternate.to_theirs([turns], sizes)
        )
        return torch.cat((stays, turns), dim=1).flatten(0, 1)


_ATTENTION = f"{LAYER}.self_attn"

LATENT_RULES = (
    rename(f"{_ATTENTION}.q_a_proj.weight", f"{MIXER}.query_down.weight"),
    rename(f"{_ATTENTION}.q_a_layernorm.weight", f"{MIXER}.query_norm.weight"),
    Rule(
        (f"{_ATTENTION}.q_b_proj.weight",),
        (f"{MIXER}.query_up.weight",),
        SortPairs(by_head=True),
        given="query_compression_size",
    ),
    Rule(
        (f"{_ATTENTION}.q_proj.weight",),
        (f"{MIXER}.query_up.weight",),
        SortPairs(by_head=True),
        absent="query_compression_size",
    ),
    Rule(
        (f"{_ATTENTION}.kv_a_proj_with_mqa.weight",),
        (f"{MIXER}.key_value_down.weight",),
        SortPairs(),
    ),
    rename(f"{_ATTENTION}.kv_a_layernorm.weight", f"{MIXER}.key_value_norm.weight"),
    Rule(
        (f"{_ATTENTION}.kv_b_proj.weight",),
        (f"{MIXER}.key_up.weight", f"{MIXER}.value_up.weight"),
        SplitHeads(("head_dim", "value_head_dim")),
    ),
    rename(f"{_ATTENTION}.o_proj.weight", f"{MIXER}.output.weight"),
)
"""Projections without biases, keys and values made of the same channels."""


def read_latent_attention(theirs: Settings, scaling: Mapping[str, Any] | None) -> dict[str, Any]:
    """Read latent attention.

    Args:
        theirs: Their settings.
        scaling: `rope_scaling` of ours, read from the same file.

    Raises:
        UnsupportedModelError: For biases, or rows that rotate in another order.
        ConversionError: If a field is missing or malformed.
    """
    heads = theirs.integer("num_attention_heads")
    theirs.expect("num_key_value_heads", (None, heads))
    theirs.expect("attention_bias", (None, False))
    theirs.expect("rope_interleave", (None, True))
    # Made of the others by their class.
    theirs.drop(("head_dim", "qk_head_dim"))
    stays, turns = theirs.integer("qk_nope_head_dim"), theirs.integer("qk_rope_head_dim")
    factor = _factor(stays + turns, scaling)
    return {
        "sequence_mixer_type": "multihead_latent_attention",
        "num_attention_heads": heads,
        "head_dim": stays,
        "query_compression_size": theirs.optional_integer("q_lora_rank"),
        "key_value_compression_size": theirs.integer("kv_lora_rank"),
        "share_compression": True,
        "rope_head_dim": turns,
        "value_head_dim": theirs.integer("v_head_dim"),
        "softmax_dropout": theirs.number("attention_dropout", 0.0),
        "add_bias": False,
        "attention_multiplier": None if factor == (stays + turns) ** -0.5 else factor,
        "normalization_function": "rmsnorm",
        "normalization_epsilon": _EPSILON,
    }


def write_latent_attention(
    ours: Settings, mixer: Settings, scaling: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Write latent attention.

    Args:
        ours: Our settings.
        mixer: A block of ours.
        scaling: `rope_scaling` as it goes into the file.

    Raises:
        UnsupportedModelError: If the block has parts or numbers that theirs lacks.
        ConversionError: If a field is missing or malformed.
    """
    mixer.expect("sequence_mixer_type", ("multihead_latent_attention",), "softmax_attention")
    mixer.expect("share_compression", (True,), default=False)
    mixer.expect("normalization_function", ("rmsnorm",), default="layernorm")
    mixer.drop(("dropout",))
    epsilon = mixer.number("normalization_epsilon", ours.number("layer_norm_epsilon"))
    if epsilon != _EPSILON:
        raise UnsupportedModelError(
            f"`normalization_epsilon` amounts to {epsilon} in {mixer.where}; this family always "
            f"has {_EPSILON}"
        )
    heads, stays = mixer.integer("num_attention_heads"), mixer.integer("head_dim")
    turns = mixer.integer("rope_head_dim")
    ours.expect("rope_dim", (None, turns))
    expected, plain = _factor(stays + turns, scaling), (stays + turns) ** -0.5
    factor = mixer.number("attention_multiplier", plain)
    if factor != expected:
        raise UnsupportedModelError(
            f"`attention_multiplier` amounts to {factor} in {mixer.where}; this family has "
            f"{expected} with this `rope_scaling`"
        )
    return {
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "qk_nope_head_dim": stays,
        "qk_rope_head_dim": turns,
        "v_head_dim": mixer.integer("value_head_dim", stays),
        "q_lora_rank": mixer.optional_integer("query_compression_size"),
        "kv_lora_rank": mixer.integer("key_value_compression_size"),
        "attention_bias": False,
        "attention_dropout": mixer.number("softmax_dropout", 0.0),
        "rope_interleave": True,
    }


def _factor(channels: int, scaling: Mapping[str, Any] | None) -> float:
    """Factor of query times key; a context stretched by YaRN sharpens attention twice over."""
    plain = channels**-0.5
    magnitude = (scaling or {}).get("mscale_all_dim")
    if scaling is None or not magnitude or scaling["factor"] <= 1:
        return plain
    scale = 0.1 * magnitude * math.log(scaling["factor"]) + 1.0
    return plain * scale * scale
