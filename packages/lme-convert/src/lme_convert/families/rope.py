"""Rotary settings in the three forms in which files hold them.

`rope_parameters` (transformers 5), `rope_theta` with `rope_scaling` (transformers 4), and ours:
`rope_theta` with a `rope_scaling` that is null or has a `rope_type`.
"""

from collections.abc import Mapping
from typing import Any

from lme_convert.errors import ConversionError, UnsupportedModelError
from lme_convert.settings import Settings

_DEFAULT_THETA = 10000.0

_FIELDS = {
    "linear": ("factor",),
    "llama3": (
        "factor",
        "original_max_position_embeddings",
        "low_freq_factor",
        "high_freq_factor",
    ),
    "yarn": (
        "factor",
        "original_max_position_embeddings",
        "beta_fast",
        "beta_slow",
        "attention_factor",
        "mscale",
        "mscale_all_dim",
        "truncate",
    ),
}
# Present in files, read by nothing.
_IDLE = ("finetuned",)


def read_rope(
    theirs: Settings, default_theta: float = _DEFAULT_THETA, *, partial: bool = False
) -> dict[str, Any]:
    """Translate their rotary settings to `rope_theta` and `rope_scaling` of ours.

    Args:
        theirs: Their settings.
        default_theta: What their class takes where a file has no base.
        partial: Whether the family may rotate some channels only; see `read_rotary_factor`.

    Raises:
        UnsupportedModelError: For a kind of scaling that we do not have, naming it.
        ConversionError: If a field is malformed or missing.
    """
    parameters = _mapping(theirs, "rope_parameters")
    # Where a file has both, transformers lets the older one win.
    parameters = _mapping(theirs, "rope_scaling") or parameters
    theta = theirs.number("rope_theta", default_theta)
    factor = theirs.number("partial_rotary_factor", 1.0)
    original = theirs.optional_integer("original_max_position_embeddings")
    scaling = Settings(parameters, f"{theirs.where} (rope)")
    theta = scaling.number("rope_theta", theta)
    old_kind = scaling.string("type", "default")
    kind = scaling.string("rope_type", old_kind)
    factor = scaling.number("partial_rotary_factor", factor)
    if factor != 1.0 and not partial:
        raise UnsupportedModelError(
            f"`partial_rotary_factor` is {factor} in the config of {theirs.where}; only 1 can be "
            "converted exactly"
        )
    if kind == "default":
        scaling.drop((*_IDLE, "factor", "original_max_position_embeddings"))
        scaling.refuse_rest()
        return {"rope_theta": theta, "rope_scaling": None}
    if kind not in _FIELDS:
        raise UnsupportedModelError(
            f"`rope_type` is {kind!r} in the config of {theirs.where}; known are default, "
            f"{', '.join(_FIELDS)}"
        )
    length = theirs.integer("max_position_embeddings")
    return {"rope_theta": theta, "rope_scaling": _read_scaling(scaling, kind, original, length)}


def read_rotary_factor(theirs: Settings, default: float = 1.0) -> float:
    """Read which part of a head's channels rotates.

    Args:
        theirs: Their settings.
        default: What their class takes where a file has no such field.

    Raises:
        ConversionError: If it is no number above 0 and up to 1.
    """
    inner = _mapping(theirs, "rope_scaling") or _mapping(theirs, "rope_parameters")
    outer = theirs.number("partial_rotary_factor", default)
    factor = Settings(inner, f"{theirs.where} (rope)").number("partial_rotary_factor", outer)
    if not 0 < factor <= 1:
        raise ConversionError(
            f"`partial_rotary_factor` of {theirs.where} must be above 0 and at most 1, got {factor}"
        )
    return factor


def write_rope(ours: Settings, length: int) -> dict[str, Any]:
    """Translate our rotary settings to theirs, in both of their forms at once.

    Files that hold both are read alike by transformers 4 and 5.

    Args:
        ours: Our settings.
        length: `max_position_embeddings`, in tokens.

    Raises:
        UnsupportedModelError: For a kind of scaling that they do not have.
        ConversionError: If a field is malformed or missing.
    """
    theta = ours.number("rope_theta", _DEFAULT_THETA)
    given = _mapping(ours, "rope_scaling")
    if not given:
        both = {"rope_theta": theta, "rope_scaling": None}
        return both | {"rope_parameters": {"rope_type": "default", "rope_theta": theta}}
    settings = Settings(given, f"{ours.where} (rope_scaling)")
    # The seed's files have no kind: theirs is YaRN.
    old_kind = settings.string("type", "yarn")
    kind = settings.string("rope_type", old_kind)
    if kind not in _FIELDS:
        raise UnsupportedModelError(
            f"`rope_scaling.rope_type` is {kind!r}, unknown to transformers"
        )
    scaling = _read_scaling(settings, kind, None, length)
    return {
        "rope_theta": theta,
        "rope_scaling": scaling,
        "rope_parameters": scaling | {"rope_theta": theta},
    }


def _read_scaling(
    settings: Settings, kind: str, original: int | None, length: int
) -> dict[str, Any]:
    settings.drop((*_IDLE, "rope_theta", "rope_type", "type"))
    result: dict[str, Any] = {"rope_type": kind}
    for name in _FIELDS[kind]:
        if name == "original_max_position_embeddings":
            inner = settings.optional_integer(name)
            # A length outside the mapping wins over the one inside, as in transformers.
            result[name] = original or inner or length
        elif name == "truncate":
            if not settings.boolean(name, True):
                result[name] = False
        elif (value := settings.optional_number(name)) is not None:
            result[name] = value
    if kind == "yarn" and "factor" not in result:
        result["factor"] = length / result["original_max_position_embeddings"]
    required = (
        ("factor", "low_freq_factor", "high_freq_factor") if kind == "llama3" else ("factor",)
    )
    for name in required:
        if name not in result:
            raise ConversionError(f"`{name}` is missing in the config of {settings.where}")
    settings.refuse_rest()
    return result


def _mapping(settings: Settings, name: str) -> Mapping[str, Any]:
    value = settings.value(name)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConversionError(f"`{name}` of {settings.where} must be a mapping, got {value!r}")
    return value
