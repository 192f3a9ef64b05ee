"""The decoder of which several layers attend to the keys and values of one."""

from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor

from lme_core.architectures.decoder import Block, Decoder
from lme_core.architectures.decoder_config import DecoderConfig
from lme_core.architectures.gpt_base import GPTBaseBlock
from lme_core.architectures.shared_attention import (
    KeyValue,
    SharedAttention,
    SharedAttentionWithSinks,
)
from lme_core.architectures.stream import Stream
from lme_core.layers.auxiliary import Auxiliary
from lme_core.layers.context import SequenceContext
from lme_core.layers.normalization import build_norm
from lme_core.mixers.base import LayerCache
from lme_core.mixers.softmax_attention import AttentionCache, SoftmaxAttentionConfig
from lme_core.mlps.base import MLP
from lme_kernels.policy import KernelPolicy


@dataclass(frozen=True, slots=True, kw_only=True)
class GPTCrossLayerConfig(DecoderConfig):
    """Pre-norm decoder whose attention layers may share keys and values.

    Source: Brandon et al. 2024 (arXiv:2405.12981).
    """

    model_type: Literal["gpt_crosslayer"] = "gpt_crosslayer"
    """Kind of architecture."""
    sharing_pattern: tuple[int, ...] | None = None
    """For each layer the layer whose keys and values it attends to, itself or the last one before
    it that has its own; a layer without attention names itself. Absent: each has its own."""

    def __post_init__(self) -> None:
        DecoderConfig.__post_init__(self)
        owners = self.owners()
        if len(owners) != self.num_layers:
            raise ValueError(
                f"`sharing_pattern` must have `num_layers` ({self.num_layers}) entries, got "
                f"{len(owners)}"
            )
        last: int | None = None
        for layer, (owner, mixer) in enumerate(zip(owners, self.mixers(), strict=True)):
            attends = isinstance(mixer, SoftmaxAttentionConfig)
            if isinstance(mixer, SoftmaxAttentionConfig):
                _check_plain(layer, mixer)
            if owner == layer:
                last = layer if attends else last
                continue
            if not attends:
                raise ValueError(
                    f"`sharing_pattern[{layer}]` must be {layer}: the layer has no softmax "
                    f"attention and shares nothing; got {owner}"
                )
            if owner != last:
                raise ValueError(
                    f"`sharing_pattern[{layer}]` must be {layer}, for keys and values of its own, "
                    f"or {last}, the last layer before it that has them; got {owner}"
                )
            self._check_heads(layer, owner)

    def owners(self) -> tuple[int, ...]:
        """Layer whose keys and values each layer attends to."""
        if self.sharing_pattern is None:
            return tuple(range(self.num_layers))
        return self.sharing_pattern

    def block_flops(self, sequence_length: int) -> float:
        """Floating-point operations of all blocks; see `DecoderConfig`."""
        total = DecoderConfig.block_flops(self, sequence_length)
        for layer, (owner, mixer) in enumerate(zip(self.owners(), self.mixers(), strict=True)):
            if owner != layer and isinstance(mixer, SoftmaxAttentionConfig):
                width = 2 * mixer.num_key_value_heads * mixer.head_size(self.hidden_size)
                total -= 2.0 * self.hidden_size * width
        return total

    def build(self, kernels: KernelPolicy, *, seed: int = 42) -> Decoder:
        """Build the model; under `torch.device("meta")` without memory and values.

        Args:
            kernels: Which implementations run.
            seed: Seed of the initial values.
        """

        def block(layer: int) -> Block:
            if isinstance(self.mixers()[layer], SoftmaxAttentionConfig):
                return CrossLayerBlock(self, layer, kernels)
            return GPTBaseBlock(self, layer, kernels)

        return Decoder(self, block, kernels, seed)

    def _check_heads(self, layer: int, owner: int) -> None:
        sizes = [
            (mixer.num_key_value_heads, mixer.head_size(self.hidden_size))
            for mixer in (self.mixers()[layer], self.mixers()[owner])
            if isinstance(mixer, SoftmaxAttentionConfig)
        ]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"`sharing_pattern[{layer}]`: layers {layer} and {owner} share keys and values and "
                f"must agree on `num_key_value_heads` and head size, got {sizes[0]} and {sizes[1]}"
            )


def _check_plain(layer: int, mixer: SoftmaxAttentionConfig) -> None:
    for name, value in (
        ("qk_norm_across_heads", mixer.qk_norm_across_heads),
        ("rope_theta", mixer.rope_theta),
    ):
        if value:
            raise ValueError(
                f"`sequence_mixer_blocks[{layer}].{name}` is {value}, which layers that may share "
                f"keys cannot have: leave it out, or take `model_type: gpt_base`"
            )


@dataclass(slots=True)
class NoCache:
    """Cache of a layer that keeps nothing."""

    def reorder(self, rows: Tensor) -> None:
        """Do nothing."""


class CrossLayerBlock(Block):
    """x + attention(norm(x), keys, values), then x + mlp(norm(x)), additions times `m_residual`.

    The stream carries keys and values to the layers that share them.
    """

    def __init__(self, config: GPTCrossLayerConfig, layer: int, kernels: KernelPolicy) -> None:
        """Allocate without initialising.

        Args:
            config: The architecture.
            layer: Index of the layer, which has softmax attention.
            kernels: Which implementations run.
        """
        super().__init__()
        attention = cast(SoftmaxAttentionConfig, config.mixers()[layer])
        H = config.hidden_size
        self.attention = attention
        self.head_size = attention.head_size(H)
        self.residual_scale = 1.0 if config.m_residual is None else config.m_residual
        self.key_value: KeyValue | None = None
        if config.owners()[layer] == layer:
            self.key_value = KeyValue(attention, config, kernels)
        self.mixer_norm = build_norm(config, H, kernels)
        kind = SharedAttentionWithSinks if attention.attention_sinks else SharedAttention
        self.sequence_mixer = kind(attention, config, kernels)
        self.mlp_norm = build_norm(config, H, kernels)
        self.mlp: MLP = config.mlps()[layer].build(config, layer, kernels)

    def forward(
        self, stream: Stream, context: SequenceContext, cache: LayerCache | None
    ) -> tuple[Stream, Auxiliary]:
        """Update the residual stream; see `Block`."""
        if self.key_value is None:
            key, value = stream.carried
        else:
            key, value = self.key_value(stream.x, context)
            if cache is not None:
                key, value = cast(AttentionCache, cache).append(key, value)
        mixed = self.sequence_mixer(self.mixer_norm(stream.x), key, value, context)
        normalized, x = self.mlp_norm(mixed, stream.x, self.residual_scale)
        y, auxiliary = self.mlp(normalized, context)
        x = x + (y if self.residual_scale == 1.0 else self.residual_scale * y)
        return Stream(x, (key, value)), auxiliary

    def new_cache(
        self, batch_size: int, max_length: int, *, device: torch.device, dtype: torch.dtype
    ) -> LayerCache:
        """Make an empty cache, where the layer has keys and values of its own."""
        if self.key_value is None:
            return NoCache()
        shape = (batch_size, max_length, self.attention.num_key_value_heads, self.head_size)
        return AttentionCache(
            torch.zeros(shape, device=device, dtype=dtype),
            torch.zeros(shape, device=device, dtype=dtype),
        )
