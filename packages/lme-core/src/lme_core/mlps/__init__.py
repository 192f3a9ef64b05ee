"""MLPs: one line a kind."""

from typing import Annotated, Any

from pydantic import Discriminator, Tag

from lme_core.layers.unions import tag_of
from lme_core.mlps.dense import DenseMLPConfig
from lme_core.mlps.moe import MoEConfig
from lme_core.mlps.none import NoMLPConfig


def _kind(value: Any) -> str | None:
    return tag_of(value, "mlp_type", default="MLP")


# `Any` above: what a run file holds before it is validated.
MLPConfig = Annotated[
    Annotated[DenseMLPConfig, Tag("MLP")]
    | Annotated[MoEConfig, Tag("MoE")]
    | Annotated[NoMLPConfig, Tag("none")],
    Discriminator(_kind),
]
