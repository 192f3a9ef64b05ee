"""Sequence mixers: one line a mixer."""

from typing import Annotated, Any

from pydantic import Discriminator, Tag

from lme_core.layers.unions import tag_of
from lme_core.mixers.mamba2 import Mamba2Config
from lme_core.mixers.softmax_attention import SoftmaxAttentionConfig


def _kind(value: Any) -> str | None:
    return tag_of(value, "sequence_mixer_type", default="softmax_attention")


# `Any` above: what a run file holds before it is validated.
MixerConfig = Annotated[
    Annotated[SoftmaxAttentionConfig, Tag("softmax_attention")]
    | Annotated[Mamba2Config, Tag("mamba2")],
    Discriminator(_kind),
]
