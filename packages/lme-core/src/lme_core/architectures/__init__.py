"""Architectures: one line each."""

from typing import Annotated, Any

from pydantic import Discriminator, Tag

from lme_core.architectures.gpt_base import GPTBaseConfig
from lme_core.architectures.gpt_crosslayer import GPTCrossLayerConfig
from lme_core.architectures.ladder_residual import LadderResidualConfig
from lme_core.architectures.palm import PaLMConfig
from lme_core.layers.unions import tag_of


def _kind(value: Any) -> str | None:
    return tag_of(value, "model_type", default="gpt_base")


# `Any` above: what a run file holds before it is validated.
ModelConfig = Annotated[
    Annotated[GPTBaseConfig, Tag("gpt_base")]
    | Annotated[GPTCrossLayerConfig, Tag("gpt_crosslayer")]
    | Annotated[LadderResidualConfig, Tag("ladder_residual")]
    | Annotated[PaLMConfig, Tag("palm")],
    Discriminator(_kind),
]
