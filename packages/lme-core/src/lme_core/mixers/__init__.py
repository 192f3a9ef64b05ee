"""Sequence mixers: one line a mixer."""

from typing import Annotated, Any

from pydantic import Discriminator, Tag

from lme_core.layers.unions import tag_of
from lme_core.mixers.causal_convolution import CausalConvolutionConfig
from lme_core.mixers.gated_deltanet import GatedDeltaNetConfig
from lme_core.mixers.gru import GRUConfig
from lme_core.mixers.linear_attention import LinearAttentionConfig
from lme_core.mixers.lstm import LSTMConfig
from lme_core.mixers.m2rnn import M2RNNConfig
from lme_core.mixers.mamba2 import Mamba2Config
from lme_core.mixers.multihead_latent_attention import MultiheadLatentAttentionConfig
from lme_core.mixers.rnn import RNNConfig
from lme_core.mixers.softmax_attention import SoftmaxAttentionConfig


def _kind(value: Any) -> str | None:
    return tag_of(value, "sequence_mixer_type", default="softmax_attention")


# `Any` above: what a run file holds before it is validated.
MixerConfig = Annotated[
    Annotated[SoftmaxAttentionConfig, Tag("softmax_attention")]
    | Annotated[CausalConvolutionConfig, Tag("causal_convolution")]
    | Annotated[GatedDeltaNetConfig, Tag("gated_deltanet")]
    | Annotated[GRUConfig, Tag("gru")]
    | Annotated[LinearAttentionConfig, Tag("linear_attention")]
    | Annotated[LSTMConfig, Tag("lstm")]
    | Annotated[M2RNNConfig, Tag("m2rnn")]
    | Annotated[Mamba2Config, Tag("mamba2")]
    | Annotated[MultiheadLatentAttentionConfig, Tag("multihead_latent_attention")]
    | Annotated[RNNConfig, Tag("rnn")],
    Discriminator(_kind),
]
