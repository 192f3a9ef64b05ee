"""Our parameter names and shapes, from a `config.json` of ours.

The one place of this package that states what the model expects; every conversion is checked
against it before a tensor is read.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from lme_convert.errors import ConversionError, UnsupportedModelError

Config = Mapping[str, Any]
"""Contents of a `config.json`: JSON values, checked where they are used."""


_DEFAULTS: Config = MappingProxyType(
    {
        "normalization_function": "rmsnorm",
        "position_embedding_type": "rope",
        "norm_placement": "pre",
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": False,
        "sequence_mixer_blocks": None,
        "mlp_blocks": None,
    }
)
# Of the kinds that an absent kind means.
_BLOCK_DEFAULTS: Mapping[str, Config] = MappingProxyType(
    {
        "softmax_attention": {"num_attention_heads": 12, "num_key_value_heads": 1},
        "MLP": {"activation_function": "gelu_pytorch_tanh"},
        "MoE": {
            "activation_function": "gelu_pytorch_tanh",
            "num_experts": 8,
            "num_experts_per_tok": 2,
        },
    }
)
_KINDS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "sequence_mixer_blocks": ("sequence_mixer_type", "softmax_attention"),
        "mlp_blocks": ("mlp_type", "MLP"),
    }
)

# Added to what a bfloat16 would round away: a conversion to another dtype leaves them as they are.
UNROUNDED = (".selection_bias", ".e_score_correction_bias")

_MAX_SIZE = 2**31 - 1
# Above any model; a stranger's config must not decide how long a list is made.
_MAX_LAYERS = 10_000
_MAX_EXPERTS = 1_000_000


def is_gated(activation_function: str) -> bool:
    """Whether an activation is a gated linear unit, whose first projection is twice as wide."""
    return activation_function.endswith("glu")


def with_defaults(config: Config) -> dict[str, Any]:
    """Fill in the fields that a `config.json` written by hand may leave out."""
    return {**_DEFAULTS, **config}


def integer(config: Config, name: str, default: int | None = None) -> int:
    """Value of a field that must be a size, or a default where it may be absent or null.

    Raises:
        ConversionError: If it is missing or not an integer from 1 to 2**31 - 1.
    """
    value = config.get(name)
    value = default if value is None else value
    if type(value) is not int or not 1 <= value <= _MAX_SIZE:
        raise ConversionError(
            f"`{name}` must be an integer from 1 to {_MAX_SIZE} in the config of the model "
            f"directory, got {value!r}"
        )
    return value


def blocks(config: Config, name: str) -> list[dict[str, Any]]:
    """One entry a layer of `sequence_mixer_blocks` or `mlp_blocks`, usual fields filled in.

    One entry stands for all layers; null for one of the usual kind.

    Raises:
        ConversionError: If there are neither 1 nor `num_layers` entries.
    """
    num_layers, (key, usual) = integer(config, "num_layers"), _KINDS[name]
    entries = config.get(name)
    entries = [{}] if entries is None else entries
    if num_layers > _MAX_LAYERS:
        raise ConversionError(f"`num_layers` is {num_layers}; at most {_MAX_LAYERS} are converted")
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ConversionError(f"`{name}` must be a list of mappings")
    if len(entries) not in (1, num_layers):
        raise ConversionError(f"`{name}` must have 1 or `num_layers` = {num_layers} entries")
    full = []
    for entry in entries * num_layers if len(entries) == 1 else entries:
        kind = str(entry.get(key, usual))
        full.append({key: kind, **_BLOCK_DEFAULTS.get(kind, {}), **entry})
    return full


def layer_sizes(config: Config) -> list[dict[str, int]]:
    """Sizes that rules need, one entry a layer."""
    mixers, mlps = blocks(config, "sequence_mixer_blocks"), blocks(config, "mlp_blocks")
    experts = sum(_mixture_sizes(mlp).get("num_experts", 0) for mlp in mlps)
    if experts > _MAX_EXPERTS:
        raise ConversionError(
            f"`num_experts` is {experts} in all layers together; at most {_MAX_EXPERTS} are "
            "converted"
        )
    return [
        {
            "hidden_size": integer(config, "hidden_size"),
            **_mixer_sizes(config, mixer),
            **({} if mlp["mlp_type"] == "none" else {"intermediate_size": mlp_width(config, mlp)}),
            **_mixture_sizes(mlp),
        }
        for mixer, mlp in zip(mixers, mlps, strict=True)
    ]


def _mixer_sizes(config: Config, mixer: Config) -> dict[str, int]:
    if mixer["sequence_mixer_type"] == "multihead_latent_attention":
        return latent_sizes(mixer)
    if mixer["sequence_mixer_type"] == "mamba2":
        return mamba2_sizes(config, mixer)
    if mixer["sequence_mixer_type"] == "gated_deltanet":
        return deltanet_sizes(mixer)
    return {
        "num_attention_heads": integer(mixer, "num_attention_heads"),
        "num_key_value_heads": integer(mixer, "num_key_value_heads"),
        "head_dim": head_dim(config, mixer),
    }


def _mixture_sizes(mlp: Config) -> dict[str, int]:
    if mlp["mlp_type"] != "MoE":
        return {}
    sizes = {"num_experts": integer(mlp, "num_experts")}
    if mlp.get("shared_intermediate_size") is not None:
        sizes["shared_intermediate_size"] = integer(mlp, "shared_intermediate_size")
    return sizes


def latent_sizes(mixer: Config) -> dict[str, int]:
    """Sizes of multi-head latent attention; `query_compression_size` only where there is one.

    Raises:
        ConversionError: If one is missing or malformed.
    """
    sizes = {
        name: integer(mixer, name)
        for name in ("num_attention_heads", "head_dim", "key_value_compression_size")
    }
    sizes["value_head_dim"] = integer(mixer, "value_head_dim", sizes["head_dim"])
    sizes |= {
        name: integer(mixer, name)
        for name in ("query_compression_size", "rope_head_dim")
        if mixer.get(name) is not None
    }
    return sizes


def mamba2_sizes(config: Config, mixer: Config) -> dict[str, int]:
    """Sizes of a Mamba 2 mixer.

    Raises:
        ConversionError: If one is malformed.
    """
    return {
        "state_size": integer(mixer, "state_size", 128),
        "channels": integer(mixer, "intermediate_size", 2 * integer(config, "hidden_size")),
        "num_heads": integer(mixer, "num_heads", 128),
        "num_groups": integer(mixer, "num_groups", 8),
        "conv_kernel_size": integer(mixer, "conv_kernel_size", 4),
    }


def deltanet_sizes(mixer: Config) -> dict[str, int]:
    """Sizes of a Gated DeltaNet mixer.

    Raises:
        ConversionError: If one is missing or malformed.
    """
    names = ("k_head_dim", "v_head_dim", "num_k_heads", "num_v_heads", "kernel_size")
    sizes = {name: integer(mixer, name) for name in names}
    if sizes["num_v_heads"] % sizes["num_k_heads"]:
        raise ConversionError("`num_v_heads` must be a multiple of `num_k_heads`")
    return sizes


def head_dim(config: Config, mixer: Config) -> int:
    """Channels of a head: `head_dim`, or the hidden size shared among the query heads."""
    heads = integer(mixer, "num_attention_heads")
    if heads % integer(mixer, "num_key_value_heads"):
        raise ConversionError("`num_attention_heads` must be a multiple of `num_key_value_heads`")
    return integer(mixer, "head_dim", integer(config, "hidden_size") // heads)


def mlp_width(config: Config, mlp: Config) -> int:
    """Width of an MLP: `intermediate_size`, or four times the hidden size."""
    return integer(mlp, "intermediate_size", 4 * integer(config, "hidden_size"))


def expected_parameters(config: Config) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a model of ours, in the order in which it is stored.

    Args:
        config: Contents of our `config.json`.

    Raises:
        UnsupportedModelError: For an architecture, mixer or MLP that no family can express yet.
        ConversionError: If a field is missing.
    """
    config = with_defaults(config)
    if config.get("model_type") != "gpt_base":
        raise UnsupportedModelError(
            f"`model_type` {config.get('model_type')!r} cannot be converted; only gpt_base can"
        )
    vocab_size, hidden_size = integer(config, "vocab_size"), integer(config, "hidden_size")
    shapes: dict[str, tuple[int, ...]] = {"embedding.weight": (vocab_size, hidden_size)}
    if config["position_embedding_type"] == "learned_absolute":
        shapes["position_embedding.weight"] = (
            integer(config, "max_position_embeddings"),
            hidden_size,
        )
    mixers, mlps = blocks(config, "sequence_mixer_blocks"), blocks(config, "mlp_blocks")
    for layer, (mixer, mlp) in enumerate(zip(mixers, mlps, strict=True)):
        prefix = f"blocks.{layer}"
        shapes |= _norm_around(config, prefix, "mixer_norm", hidden_size)
        shapes |= _mixer(config, mixer, f"{prefix}.sequence_mixer")
        if mlp["mlp_type"] != "none":
            shapes |= _norm_around(config, prefix, "mlp_norm", hidden_size)
            shapes |= _mlp(config, mlp, f"{prefix}.mlp")
    shapes |= _norm(config, "final_norm", hidden_size)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab_size, hidden_size)
    return shapes


def _norm(config: Config, name: str, size: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": (size,)}
    if config["normalization_function"] == "layernorm":
        shapes[f"{name}.bias"] = (size,)
    return shapes


def _norm_around(config: Config, prefix: str, name: str, size: int) -> dict[str, tuple[int, ...]]:
    placement = config["norm_placement"]
    if placement not in ("pre", "post", "sandwich"):
        raise UnsupportedModelError(f"`norm_placement` is {placement!r}, which is unknown")
    shapes: dict[str, tuple[int, ...]] = {}
    if placement != "post":
        shapes |= _norm(config, f"{prefix}.{name}", size)
    if placement != "pre":
        shapes |= _norm(config, f"{prefix}.{name.removesuffix('_norm')}_output_norm", size)
    return shapes


def _linear(name: str, rows: int, columns: int, bias: bool) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": (rows, columns)}
    if bias:
        shapes[f"{name}.bias"] = (rows,)
    return shapes


def _mixer(config: Config, mixer: Config, name: str) -> dict[str, tuple[int, ...]]:
    kind = mixer["sequence_mixer_type"]
    if kind == "multihead_latent_attention":
        return _latent_attention(config, mixer, name)
    if kind == "mamba2":
        return _mamba2(config, mixer, name)
    if kind == "gated_deltanet":
        return _gated_deltanet(config, mixer, name)
    if kind != "softmax_attention":
        raise UnsupportedModelError(f"`sequence_mixer_type` {kind} cannot be converted yet")
    return _softmax_attention(config, mixer, name)


def _softmax_attention(config: Config, mixer: Config, name: str) -> dict[str, tuple[int, ...]]:
    hidden_size, channels = integer(config, "hidden_size"), head_dim(config, mixer)
    queries = integer(mixer, "num_attention_heads") * channels
    keys = integer(mixer, "num_key_value_heads") * channels
    rows = queries + 2 * keys + (queries if mixer.get("attention_gate") else 0)
    bias = bool(mixer.get("add_bias"))
    qkv_bias = mixer.get("qkv_bias")
    shapes = _linear(f"{name}.qkv", rows, hidden_size, bias if qkv_bias is None else qkv_bias)
    if mixer.get("qk_norm"):
        together = mixer.get("qk_norm_across_heads")
        shapes[f"{name}.query_norm.weight"] = (queries if together else channels,)
        shapes[f"{name}.key_norm.weight"] = (keys if together else channels,)
    return shapes | _linear(f"{name}.output", hidden_size, queries, bias)


def _mlp(config: Config, mlp: Config, name: str) -> dict[str, tuple[int, ...]]:
    kind = mlp["mlp_type"]
    if kind == "MoE":
        return _mixture(config, mlp, name)
    if kind != "MLP":
        raise UnsupportedModelError(f"`mlp_type` {kind} cannot be converted yet")
    return _dense(config, mlp, name, mlp_width(config, mlp))


def _dense(config: Config, mlp: Config, name: str, width: int) -> dict[str, tuple[int, ...]]:
    hidden_size, bias, gated = integer(config, "hidden_size"), bool(mlp.get("add_bias")), _gate(mlp)
    first = f"{name}.gate_up" if gated else f"{name}.up"
    return _linear(first, 2 * width if gated else width, hidden_size, bias) | _linear(
        f"{name}.down", hidden_size, width, bias
    )


def _mixture(config: Config, mlp: Config, name: str) -> dict[str, tuple[int, ...]]:
    experts, hidden_size = integer(mlp, "num_experts"), integer(config, "hidden_size")
    shapes: dict[str, tuple[int, ...]] = {f"{name}.router.weight": (experts, hidden_size)}
    if mlp.get("expert_bias_update_rate") is not None:
        shapes[f"{name}.router.selection_bias"] = (experts,)
    of_one = _dense(config, mlp, f"{name}.experts", mlp_width(config, mlp))
    shapes |= {tensor: (experts, *shape) for tensor, shape in of_one.items()}
    if mlp.get("shared_intermediate_size") is not None:
        width = integer(mlp, "shared_intermediate_size")
        shapes |= _dense(config, mlp, f"{name}.shared", width)
    if mlp.get("shared_expert_gating"):
        shapes[f"{name}.shared_gate.weight"] = (1, hidden_size)
    return shapes


def _latent_attention(config: Config, mixer: Config, name: str) -> dict[str, tuple[int, ...]]:
    sizes, hidden_size = latent_sizes(mixer), integer(config, "hidden_size")
    heads, bias = sizes["num_attention_heads"], bool(mixer.get("add_bias"))
    compressed = sizes["key_value_compression_size"]
    latent = compressed * (1 if mixer.get("share_compression") else 2)
    rotary, values = sizes.get("rope_head_dim", 0), heads * sizes["value_head_dim"]
    kind = {"normalization_function": mixer.get("normalization_function", "layernorm")}
    shapes: dict[str, tuple[int, ...]] = {}
    queries = sizes.get("query_compression_size")
    if queries is not None:
        shapes |= _linear(f"{name}.query_down", queries, hidden_size, bias)
        shapes |= _norm(kind, f"{name}.query_norm", queries)
    rows = heads * (sizes["head_dim"] + rotary)
    shapes |= _linear(f"{name}.query_up", rows, queries or hidden_size, bias)
    shapes |= _linear(f"{name}.key_value_down", latent + rotary, hidden_size, bias)
    shapes |= _norm(kind, f"{name}.key_value_norm", latent)
    shapes |= _linear(f"{name}.key_up", heads * sizes["head_dim"], compressed, bias)
    shapes |= _linear(f"{name}.value_up", values, compressed, bias)
    return shapes | _linear(f"{name}.output", hidden_size, values, bias)


def _mamba2(config: Config, mixer: Config, name: str) -> dict[str, tuple[int, ...]]:
    sizes, hidden_size = mamba2_sizes(config, mixer), integer(config, "hidden_size")
    bias, width, heads = bool(mixer.get("add_bias")), sizes["channels"], sizes["num_heads"]
    convolved = width + 2 * sizes["num_groups"] * sizes["state_size"]
    shapes: dict[str, tuple[int, ...]] = {f"{name}.D": (heads,)}
    shapes |= _linear(f"{name}.input", width + convolved + heads, hidden_size, bias)
    shapes[f"{name}.convolution.weight"] = (convolved, 1, sizes["conv_kernel_size"])
    if mixer.get("use_conv_bias", True):
        shapes[f"{name}.convolution.bias"] = (convolved,)
    shapes |= _decay_gate(name, heads)
    kind = mixer.get("normalization_function", "rmsnorm")
    if kind is not None:
        shapes |= _norm({"normalization_function": kind}, f"{name}.norm", width)
    return shapes | _linear(f"{name}.output", hidden_size, width, bias)


def _gated_deltanet(config: Config, mixer: Config, name: str) -> dict[str, tuple[int, ...]]:
    sizes, hidden_size = deltanet_sizes(mixer), integer(config, "hidden_size")
    heads = sizes["num_v_heads"]
    values = heads * sizes["v_head_dim"]
    convolved = 2 * sizes["num_k_heads"] * sizes["k_head_dim"] + values
    gates = 2 * heads + (values if mixer.get("use_gate") else 0)
    return {
        f"{name}.qkv.weight": (convolved, hidden_size),
        f"{name}.gates.weight": (gates, hidden_size),
        f"{name}.convolution.weight": (convolved, 1, sizes["kernel_size"]),
        **_decay_gate(name, heads),
        f"{name}.norm.weight": (sizes["v_head_dim"],),
        f"{name}.output.weight": (hidden_size, values),
    }


def _decay_gate(name: str, heads: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.decay_gate.A_log": (heads,), f"{name}.decay_gate.dt_bias": (heads,)}


def _gate(mlp: Config) -> bool:
    activation_function = str(mlp.get("activation_function"))
    if activation_function in ("prelu", "prelu_glu", "preglu"):
        raise UnsupportedModelError(
            f"`activation_function` {activation_function} has a weight, which no family has"
        )
    return is_gated(activation_function)
