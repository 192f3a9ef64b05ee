"""Mamba 2 mixers as transformers stores them: rules, and limits of steps in both configs."""

import math
from typing import Any

from lme_convert.errors import ConversionError, UnsupportedModelError
from lme_convert.families.decoder import MIXER
from lme_convert.rules import Rule
from lme_convert.settings import Settings

_TENSORS = {
    "in_proj.weight": "input.weight",
    "in_proj.bias": "input.bias",
    "conv1d.weight": "convolution.weight",
    "conv1d.bias": "convolution.bias",
    "dt_bias": "decay_gate.dt_bias",
    "A_log": "decay_gate.A_log",
    "D": "D",
    "norm.weight": "norm.weight",
    "out_proj.weight": "output.weight",
    "out_proj.bias": "output.bias",
}

# Where transformers 5 keeps a float that JSON has no name for.
_TAG = "__float__"


def mamba_rules(mixer: str) -> tuple[Rule, ...]:
    """Rules of a mixer, all of them other names.

    Args:
        mixer: Their name of it, with `{i}`.
    """
    return tuple(
        Rule((f"{mixer}.{theirs}",), (f"{MIXER}.{ours}",), given="state_size")
        for theirs, ours in _TENSORS.items()
    )


def read_step_limit(theirs: Settings) -> list[float] | None:
    """Read the bounds of steps; `None` where they bound nothing.

    Raises:
        ConversionError: If they are not two numbers that do not fall.
    """
    return _limit(theirs)


def write_step_limit(mixer: Settings) -> list[Any]:
    """Write the bounds of steps, as transformers 5 does."""
    low, high = _limit(mixer) or (0.0, math.inf)
    return [low, {_TAG: "Infinity"} if math.isinf(high) else high]


def _limit(settings: Settings) -> list[float] | None:
    value = settings.value("time_step_limit")
    if value is None:
        return None
    entries = [_number(each) for each in value] if isinstance(value, list) else []
    numbers = [each for each in entries if each is not None]
    if len(entries) != 2 or len(numbers) != 2 or not 0 <= numbers[0] <= numbers[1]:
        raise ConversionError(
            f"`time_step_limit` of {settings.where} must be two numbers that do not fall, the "
            f"first at least 0, got {value!r}"
        )
    return None if numbers == [0.0, math.inf] else numbers


def _number(value: Any) -> float | None:  # a JSON value
    if isinstance(value, dict):
        value = value.get(_TAG)
    if value == "Infinity":
        return math.inf
    return float(value) if type(value) in (int, float) else None


def check_heads(theirs: Settings, heads: int, head_dim: int, width: int) -> None:
    """Check that heads make up the width, as their classes ask.

    Raises:
        ConversionError: If they do not.
    """
    if heads * head_dim != width:
        raise ConversionError(
            f"{heads} heads of {head_dim} channels in the config of {theirs.where} do not make up "
            f"the expanded width of {width}"
        )


def read_sizes(ours: Settings, mixer: Settings) -> dict[str, int]:
    """Read the sizes of a mixer of ours, and refuse what no file of theirs says.

    Returns:
        `expand`, how many times the hidden size all heads are wide; `head_dim`; and sizes under our
        names.

    Raises:
        UnsupportedModelError: If the block has parts that theirs lacks.
        ConversionError: If a field is malformed.
    """
    mixer.expect("sequence_mixer_type", ("mamba2",), default="softmax_attention")
    mixer.expect("normalization_function", ("rmsnorm",), default="rmsnorm")
    # Where steps and decays start, which only a new model asks for.
    mixer.drop(("A_init_min", "A_init_max", "dt_init_min", "dt_init_max", "dt_init_floor"))
    groups = mixer.integer("num_groups", 8)
    mixer.expect("normalize_by_group", (True,) if groups > 1 else (True, False), default=False)
    hidden_size = ours.integer("hidden_size")
    width = mixer.integer("intermediate_size", 2 * hidden_size)
    heads = mixer.integer("num_heads", 128)
    if width % hidden_size:
        raise UnsupportedModelError(
            f"`intermediate_size` is {width} in {mixer.where}; this family's is a multiple of "
            f"`hidden_size` ({hidden_size})"
        )
    if width % heads:
        raise ConversionError(
            f"`num_heads` ({heads}) must divide `intermediate_size` ({width}) in {mixer.where}"
        )
    return {
        "expand": width // hidden_size,
        "num_heads": heads,
        "head_dim": width // heads,
        "num_groups": groups,
        "state_size": mixer.integer("state_size", 128),
        "conv_kernel_size": mixer.integer("conv_kernel_size", 4),
        "chunk_size": mixer.integer("chunk_size", 256),
    }
