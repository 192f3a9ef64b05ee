"""The families: one line each."""

from collections.abc import Mapping
from types import MappingProxyType

from lme_convert.families.deepseek_v3 import DEEPSEEK_V3
from lme_convert.families.gemma2 import GEMMA2
from lme_convert.families.gemma3 import GEMMA3
from lme_convert.families.granite import GRANITE
from lme_convert.families.granitemoe import GRANITE_MOE
from lme_convert.families.granitemoehybrid import GRANITE_MOE_HYBRID
from lme_convert.families.granitemoeshared import GRANITE_MOE_SHARED
from lme_convert.families.llama import LLAMA
from lme_convert.families.mamba2 import MAMBA2
from lme_convert.families.mistral import MISTRAL
from lme_convert.families.mixtral import MIXTRAL
from lme_convert.families.olmo2 import OLMO2
from lme_convert.families.qwen2 import QWEN2
from lme_convert.families.qwen2_moe import QWEN2_MOE
from lme_convert.families.qwen3 import QWEN3
from lme_convert.families.qwen3_moe import QWEN3_MOE
from lme_convert.families.qwen3_next import QWEN3_NEXT
from lme_convert.family import Family
from lme_convert.layout import expected_parameters

__all__ = ["FAMILIES", "expected_parameters"]

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        family.model_type: family
        for family in (
            LLAMA,
            MISTRAL,
            QWEN2,
            QWEN3,
            GRANITE,
            MIXTRAL,
            QWEN2_MOE,
            QWEN3_MOE,
            GRANITE_MOE,
            GRANITE_MOE_SHARED,
            DEEPSEEK_V3,
            OLMO2,
            GEMMA2,
            GEMMA3,
            MAMBA2,
            GRANITE_MOE_HYBRID,
            QWEN3_NEXT,
        )
    }
)
"""By HuggingFace's `model_type`; export without a `model_type` takes the first that fits."""
