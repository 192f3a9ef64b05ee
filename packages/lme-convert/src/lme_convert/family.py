"""A HuggingFace family: its config both ways and one tuple of rules."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from lme_convert.rules import Rule
from lme_convert.settings import Settings


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One `model_type` of HuggingFace. Import runs the rules forwards, export their inverses."""

    model_type: str
    """As in their `config.json`."""
    architecture: str
    """Their class for causal language models."""
    import_config: Callable[[Settings], dict[str, Any]]
    """Their settings to our `config.json`, without `format_version`."""
    export_config: Callable[[Settings], dict[str, Any]]
    """Our settings to their `config.json`, without `architectures` and dtype."""
    rules: tuple[Rule, ...]
    """Where each tensor of ours comes from, once; in any order."""
    tied: Mapping[str, str] = field(
        default_factory=lambda: MappingProxyType({"lm_head.weight": "model.embed_tokens.weight"})
    )
    """Tensors of theirs that some files store twice when embeddings are tied, and their source."""
    ignored: tuple[str, ...] = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",)
    """Patterns of tensors that hold nothing (tables that old files stored)."""
