"""Qwen3-Next: layers of Gated DeltaNet and of gated attention, and mixtures of experts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lme_convert.errors import UnsupportedModelError
from lme_convert.families.decoder import (
    DECODER_RULES,
    LAYER,
    MIXER,
    MLP,
    QK_NORM_RULES,
    expect_no_multipliers,
    read_attention,
    read_decoder,
    read_kinds,
    single,
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
    shared_rules,
    write_aux_loss,
    write_some_dense,
)
from lme_convert.families.rope import read_rope, read_rotary_factor
from lme_convert.family import Family
from lme_convert.rules import Rule, Sizes, rename
from lme_convert.settings import Settings

_EXPERTS, _WIDTH, _SHARED = "num_experts", "moe_intermediate_size", "shared_intermediate_size"
_RECURRENT, _ATTENDING = "linear_attention", "full_attention"
_HEAD_DIM, _KEY_VALUE_HEADS, _ROTATING, _INTERVAL = 256, 2, 0.25, 4

# Ours, theirs, and what their class takes.
_SIZES = (
    ("k_head_dim", "linear_key_head_dim", 128),
    ("v_head_dim", "linear_value_head_dim", 128),
    ("num_k_heads", "linear_num_key_heads", 16),
    ("num_v_heads", "linear_num_value_heads", 32),
    ("kernel_size", "linear_conv_kernel_dim", 4),
)


@dataclass(frozen=True, slots=True)
class GatedQKV:
    """Queries and gates by head, keys and values, to rows grouped per key-value head.

    Theirs: [query, gate] of each head (N*2D, ...), key (K*D, ...), value (K*D, ...). Ours: [its
    queries, key, value, its gates] of each key-value head ((2N + 2K)*D, ...).
    """

    def to_ours(self, tensors: Sequence[Tensor], sizes: Sizes) -> list[Tensor]:
        groups, D = sizes["num_key_value_heads"], sizes["head_dim"]
        queries, gates = tensors[0].unflatten(0, (groups, -1, 2, D)).unbind(2)
        key, value = (tensor.unflatten(0, (groups, D)) for tensor in tensors[1:])
        parts = (queries.flatten(1, 2), key, value, gates.flatten(1, 2))
        return [torch.cat(parts, dim=1).flatten(0, 1)]

    def to_theirs(self, tensors: Sequence[Tensor], sizes: Sizes) -> list[Tensor]:
        groups, D = sizes["num_key_value_heads"], sizes["head_dim"]
        rows = sizes["num_attention_heads"] // groups * D
        grouped = tensors[0].unflatten(0, (groups, -1))
        queries, key, value, gates = grouped.split([rows, D, D, rows], dim=1)
        heads = [each.unflatten(1, (-1, D)) for each in (queries, gates)]
        return [torch.stack(heads, dim=2).flatten(0, 3), key.flatten(0, 1), value.flatten(0, 1)]


@dataclass(frozen=True, slots=True)
class UngroupedDelta:
    """Rows grouped by key head to rows by what they make.

    Theirs: [query, key, its values, their gates] of each key head, and [strengths of writing,
    steps of the decay]. Ours: queries, keys, values; and steps, strengths, gates.
    """

    def to_ours(self, tensors: Sequence[Tensor], sizes: Sizes) -> list[Tensor]:
        groups, (rows, heads) = sizes["num_k_heads"], self._rows(sizes)
        first, second = (tensor.unflatten(0, (groups, -1)) for tensor in tensors)
        *qkv, gates = (part.flatten(0, 1) for part in first.split(rows, dim=1))
        strengths, steps = (part.flatten(0, 1) for part in second.split([heads, heads], dim=1))
        return [torch.cat(qkv), torch.cat((steps, strengths, gates))]

    def to_theirs(self, tensors: Sequence[Tensor], sizes: Sizes) -> list[Tensor]:
        groups, (rows, heads) = sizes["num_k_heads"], self._rows(sizes)
        qkv = tensors[0].split([groups * count for count in rows[:3]])
        steps, strengths, gates = tensors[1].split(
            [groups * heads, groups * heads, groups * rows[3]]
        )
        return [
            torch.cat([part.unflatten(0, (groups, -1)) for part in parts], dim=1).flatten(0, 1)
            for parts in ((*qkv, gates), (strengths, steps))
        ]

    def _rows(self, sizes: Sizes) -> tuple[list[int], int]:
        """Rows of a key head in the first tensor, and value heads of a key head."""
        heads, keys = sizes["num_v_heads"] // sizes["num_k_heads"], sizes["k_head_dim"]
        values = heads * sizes["v_head_dim"]
        return [keys, keys, values, values], heads


def import_config(theirs: Settings) -> dict[str, Any]:
    """Qwen3-Next's config to ours."""
    head_dim = theirs.integer("head_dim", _HEAD_DIM)
    rope = read_rope(theirs, partial=True)
    config = read_decoder(theirs, rope=rope) | read_aux_loss(theirs)
    config |= {
        "zero_centered_norms": True,
        "rope_dim": int(head_dim * read_rotary_factor(theirs, _ROTATING)),
        "rope_channels": "first",
    }
    # Of the convolution before the memory too, where ours has no other.
    theirs.expect("hidden_act", ("silu",), default="silu")
    layers, interval = config["num_layers"], theirs.integer("full_attention_interval", _INTERVAL)
    kinds = read_kinds(theirs, layers, (_RECURRENT, _ATTENDING)) or [
        _RECURRENT if (i + 1) % interval else _ATTENDING for i in range(layers)
    ]
    attention = read_attention(theirs) | {
        "num_key_value_heads": theirs.integer("num_key_value_heads", _KEY_VALUE_HEADS),
        "head_dim": head_dim,
        "add_bias": theirs.boolean("attention_bias", False),
        "qk_norm": True,
        "attention_gate": True,
    }
    delta = {ours: theirs.integer(name, default) for ours, name, default in _SIZES}
    delta = {"sequence_mixer_type": "gated_deltanet"} | delta
    delta |= {"use_gate": True, "allow_neg_eigval": False, "norm_before_gate": True}
    mixers = [delta if kind == _RECURRENT else attention for kind in kinds]
    mixture = read_mixture(theirs, experts=_EXPERTS, width=_WIDTH) | {
        "normalized_topk": theirs.boolean("norm_topk_prob", True),
        _SHARED: theirs.integer("shared_expert_intermediate_size", 512),
        "shared_expert_gating": True,
    }
    mlps = read_some_dense(theirs, mixture, layers)
    theirs.warn_of_rest()
    return config | {"sequence_mixer_blocks": single(mixers), "mlp_blocks": mlps}


def export_config(ours: Settings) -> dict[str, Any]:
    """Our config to Qwen3-Next's."""
    config, mlp, dense = write_some_dense(ours, experts=_EXPERTS, width=_WIDTH)
    if config["hidden_act"] != "silu":
        mlp.expect("activation_function", ("swiglu",))
    config |= write_decoder(ours) | write_aux_loss(ours)
    ours.expect("zero_centered_norms", (True,), default=False)
    config |= {"decoder_sparse_step": 1, "mlp_only_layers": dense}
    config["norm_topk_prob"] = mlp.boolean("normalized_topk", True)
    mlp.expect("shared_expert_gating", (True,))
    config["shared_expert_intermediate_size"] = mlp.integer(_SHARED)
    expect_softmax(mlp)
    kinds = [entry["sequence_mixer_type"] for entry in ours.entries("sequence_mixer_blocks")]
    recurrent = [i for i, kind in enumerate(kinds) if kind == "gated_deltanet"]
    attending = [i for i, kind in enumerate(kinds) if kind != "gated_deltanet"]
    config["layer_types"] = [
        _RECURRENT if i in recurrent else _ATTENDING for i in range(len(kinds))
    ]
    if recurrent:
        config |= _write_delta(uniform(ours, "sequence_mixer_blocks", layers=recurrent))
    if not attending:
        raise UnsupportedModelError(
            "`sequence_mixer_type` is 'gated_deltanet' in all of `sequence_mixer_blocks`; this "
            "family has layers that attend"
        )
    config |= _write_attention(ours, uniform(ours, "sequence_mixer_blocks", layers=attending))
    config["rope_parameters"]["partial_rotary_factor"] = config["partial_rotary_factor"]
    for settings in (ours, mlp):
        settings.refuse_rest()
    return config


def _write_delta(mixer: Settings) -> dict[str, Any]:
    mixer.expect("sequence_mixer_type", ("gated_deltanet",))
    mixer.expect("use_gate", (True,))
    mixer.expect("norm_before_gate", (True,), default=False)
    mixer.expect("attention_multiplier", (None, mixer.integer("k_head_dim") ** -0.5))
    # Where steps and decays start, which only a new model asks for.
    mixer.drop(("A_init_min", "A_init_max", "dt_init_min", "dt_init_max", "dt_init_floor"))
    config = {name: mixer.integer(of_ours) for of_ours, name, _ in _SIZES}
    mixer.refuse_rest()
    return config


def _write_attention(ours: Settings, mixer: Settings) -> dict[str, Any]:
    config = write_attention(ours, mixer, partial_rotary=True)
    head_dim = config["head_dim"]
    rotating = ours.integer("rope_dim", head_dim)
    factor = rotating / head_dim
    if rotating != head_dim:
        ours.expect("rope_channels", ("first",), default="last")
    if int(head_dim * factor) != rotating:
        raise UnsupportedModelError(
            f"`rope_dim` is {rotating} of {head_dim} channels, which no `partial_rotary_factor` "
            "gives"
        )
    config["attention_bias"] = mixer.boolean("add_bias", False)
    mixer.expect("qkv_bias", (None, config["attention_bias"]))
    for name in ("qk_norm", "attention_gate"):
        mixer.expect(name, (True,), default=False)
    expect_no_multipliers(ours, mixer, head_dim)
    mixer.refuse_rest()
    return config | {"partial_rotary_factor": factor}


_DELTA = f"{LAYER}.linear_attn"


def _attention_rule(kind: str) -> Rule:
    theirs = tuple(f"{LAYER}.self_attn.{name}_proj.{kind}" for name in ("q", "k", "v"))
    return Rule(theirs, (f"{MIXER}.qkv.{kind}",), GatedQKV(), given="num_attention_heads")


def _delta_rule(theirs: str, ours: str) -> Rule:
    return Rule((f"{_DELTA}.{theirs}",), (f"{MIXER}.{ours}",), given="k_head_dim")


QWEN3_NEXT = Family(
    model_type="qwen3_next",
    architecture="Qwen3NextForCausalLM",
    import_config=import_config,
    export_config=export_config,
    rules=(
        *(rule for rule in DECODER_RULES if f"{MIXER}.qkv" not in rule.ours[0]),
        _attention_rule("weight"),
        _attention_rule("bias"),
        *QK_NORM_RULES,
        Rule(
            (f"{_DELTA}.in_proj_qkvz.weight", f"{_DELTA}.in_proj_ba.weight"),
            (f"{MIXER}.qkv.weight", f"{MIXER}.gates.weight"),
            UngroupedDelta(),
            given="k_head_dim",
        ),
        _delta_rule("conv1d.weight", "convolution.weight"),
        _delta_rule("A_log", "decay_gate.A_log"),
        _delta_rule("dt_bias", "decay_gate.dt_bias"),
        _delta_rule("norm.weight", "norm.weight"),
        _delta_rule("out_proj.weight", "output.weight"),
        rename(f"{LAYER}.mlp.gate.weight", f"{MLP}.router.weight"),
        *expert_rules("mlp.experts.{e}", gate="gate_proj", up="up_proj", down="down_proj"),
        *shared_rules("mlp.shared_expert"),
        rename(f"{LAYER}.mlp.shared_expert_gate.weight", f"{MLP}.shared_gate.weight"),
    ),
)
