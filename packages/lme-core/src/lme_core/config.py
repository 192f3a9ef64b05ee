"""The architecture's config as it stands in files: `config.json` and run files."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from pydantic import BaseModel, ConfigDict

from lme_core.architectures import ModelConfig

__all__ = ["FORMAT_VERSION", "ModelConfig", "from_dict", "to_dict"]

FORMAT_VERSION = 1
"""Version of `config.json`; the one before is read too."""

_FOREIGN_KEYS = frozenset(
    {
        "_attn_implementation_autoset",
        "_commit_hash",
        "_from_auto",
        "_name_or_path",
        "architectures",
        "auto_map",
        "dtype",
        "name_or_path",
        "torch_dtype",
        "transformers_version",
    }
)


class _Door(BaseModel):
    """Carries `forbid` into the dataclasses below it, which an adapter of one would not."""

    model_config = ConfigDict(extra="forbid")

    config: ModelConfig


# `Any`: what JSON and YAML hold before they are validated.
def from_dict(mapping: Mapping[str, Any]) -> ModelConfig:
    """Read an architecture.

    Args:
        mapping: As in `config.json` or a run file's `pretrained_config`. Keys that transformers
            adds for itself are ignored; any other that is unknown is refused.

    Returns:
        The config that `model_type` names.

    Raises:
        ValueError: If a key is unknown, a value is out of range, or the format is newer than this
            package.
    """
    settings = {name: value for name, value in mapping.items() if name not in _FOREIGN_KEYS}
    version = settings.pop("format_version", FORMAT_VERSION)
    if version not in (FORMAT_VERSION - 1, FORMAT_VERSION):
        raise ValueError(
            f"`format_version` must be {FORMAT_VERSION - 1} or {FORMAT_VERSION}, got {version}: "
            f"use the version of lme-core that wrote the file"
        )
    return _Door.model_validate({"config": settings}).config


def to_dict(config: ModelConfig) -> dict[str, Any]:
    """Write an architecture, every default filled in.

    Args:
        config: Any architecture's config.

    Returns:
        Numbers, strings, lists and mappings that `from_dict` reads back to an equal config.
    """
    return {"format_version": FORMAT_VERSION, **_plain(asdict(config))}


def _plain(value: Any) -> Any:
    """Turn tuples into lists, at every depth."""
    if isinstance(value, Mapping):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value
