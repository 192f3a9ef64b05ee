"""The families: one line each."""

from collections.abc import Mapping
from types import MappingProxyType

from lme_convert.families.granite import GRANITE
from lme_convert.families.llama import LLAMA
from lme_convert.families.mistral import MISTRAL
from lme_convert.families.qwen2 import QWEN2
from lme_convert.families.qwen3 import QWEN3
from lme_convert.family import Family
from lme_convert.layout import expected_parameters

__all__ = ["FAMILIES", "expected_parameters"]

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {family.model_type: family for family in (LLAMA, MISTRAL, QWEN2, QWEN3, GRANITE)}
)
"""By HuggingFace's `model_type`; export without a `model_type` takes the first that fits."""
