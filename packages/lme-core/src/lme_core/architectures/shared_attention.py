"""Softmax attention in two parts: keys and values of one layer, queries of several."""

from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from lme_core.layers.context import SequenceContext
from lme_core.layers.dropout import dropout
from lme_core.layers.initialization import linear_std
from lme_core.layers.linear import Linear
from lme_core.layers.normalization import Norm, build_head_norm, build_norm
from lme_core.layers.settings import ModelSettings
from lme_core.mixers.attending import attend_in_context
from lme_core.mixers.softmax_attention import (
    AttentionSinks,
    SoftmaxAttentionConfig,
    without_own_value,
)
from lme_kernels.ops.attention import ATTENTION
from lme_kernels.ops.rope import ROPE
from lme_kernels.policy import KernelPolicy

_OUTPUT_DROPOUT = 0

Rope = Callable[..., tuple[Tensor, Tensor]]


class KeyValue(nn.Module):
    """Keys and values from a block's input, with a norm of their own."""

    shard_plan: ClassVar[Mapping[str, str] | None] = {"projection": "column"}

    def __init__(
        self, config: SoftmaxAttentionConfig, settings: ModelSettings, kernels: KernelPolicy
    ) -> None:
        """Allocate without initialising.

        Args:
            config: What this layer's attention is.
            settings: The architecture.
            kernels: Which implementations run.
        """
        super().__init__()
        H, D = settings.hidden_size, config.head_size(settings.hidden_size)
        self.head_size = D
        self.shard_units = {"num_key_value_heads": config.num_key_value_heads}
        self.rope_channels = settings.rope_channels
        self.norm = build_norm(settings, H, kernels)
        # Rows go by head, [key, value].
        self.projection = Linear(
            H,
            2 * config.num_key_value_heads * D,
            bias=config.add_bias if config.qkv_bias is None else config.qkv_bias,
            std=linear_std(settings, H),
            mup=True,
        )
        self.key_norm: Norm | None = None
        if config.qk_norm:
            self.key_norm = build_head_norm(settings, D, kernels)
        self.rope: Rope = kernels.bind(ROPE)

    def forward(self, x: Tensor, context: SequenceContext) -> tuple[Tensor, Tensor]:
        """Project.

        Args:
            x: The block's input, shape (B, S, H).
            context: Facts about the batch.

        Returns:
            Keys, rotated where the model rotates, and values, shape (B, S, K, D) each.
        """
        heads = self.projection(self.norm(x)).unflatten(-1, (-1, 2, self.head_size))
        key, value = heads.unbind(-2)
        if self.key_norm is not None:
            key = self.key_norm(key)
        return _rotate(self.rope, key, context, self.rope_channels), value


class SharedAttention(nn.Module):
    """Causal softmax attention over keys and values that a layer may share with those before it."""

    shard_plan: ClassVar[Mapping[str, str] | None] = {"query": "column", "output": "row"}

    attend: Callable[..., Tensor]
    """The attention op; public as that of `SoftmaxAttention`."""
    part: tuple[int, int] = (0, 1)
    """As of a sequence mixer."""

    def __init__(
        self, config: SoftmaxAttentionConfig, settings: ModelSettings, kernels: KernelPolicy
    ) -> None:
        """Allocate without initialising.

        Args:
            config: What this layer's attention is.
            settings: The architecture.
            kernels: Which implementations run.
        """
        super().__init__()
        H, D = settings.hidden_size, config.head_size(settings.hidden_size)
        N = config.num_attention_heads
        self.config = config
        self.head_size = D
        self.shard_units = {"num_key_value_heads": config.num_key_value_heads}
        self.queries_per_key = N // config.num_key_value_heads
        self.scale = config.scale(H)
        self.rope_channels = settings.rope_channels
        # Rows go by key-value head, [its queries, their gates].
        self.query = Linear(
            H,
            (2 if config.attention_gate else 1) * N * D,
            bias=config.add_bias if config.qkv_bias is None else config.qkv_bias,
            std=linear_std(settings, H),
            mup=True,
        )
        self.output = Linear(
            N * D,
            H,
            bias=config.add_bias,
            std=linear_std(settings, N * D, output=True),
            mup=True,
        )
        self.query_norm: Norm | None = None
        if config.qk_norm:
            self.query_norm = build_head_norm(settings, D, kernels)
        self.sinks: AttentionSinks | None = None
        self.attend = kernels.bind(ATTENTION)
        self.rope: Rope = kernels.bind(ROPE)

    def forward(self, x: Tensor, key: Tensor, value: Tensor, context: SequenceContext) -> Tensor:
        """Attend.

        Args:
            x: Normalised stream, shape (B, S, H).
            key: Of all tokens seen, the S of `x` last, shape (B, T, K, D).
            value: Shape (B, T, K, D).
            context: Facts about the batch.

        Returns:
            Shape (B, S, H), to be added to the residual stream.
        """
        D, G = self.head_size, self.queries_per_key
        parts = 2 if self.config.attention_gate else 1
        query, *gate = self.query(x).unflatten(-1, (-1, parts, G, D)).unbind(-3)
        query = query.flatten(2, 3)
        if self.query_norm is not None:
            query = self.query_norm(query)
        query = _rotate(self.rope, query, context, self.rope_channels)
        attended = self._attend(query, key, value, context)
        if self.config.exclusive_self_attention:
            attended = without_own_value(attended, value[:, -x.shape[1] :])
        if gate:
            attended = attended * torch.sigmoid(gate[0].flatten(2, 3))
        y = self.output(attended.flatten(2))
        if context.dropout_key is None or context.token_index is None:
            return y
        return dropout(
            y, self.config.dropout, context.dropout_key, _OUTPUT_DROPOUT, context.token_index
        )

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, context: SequenceContext
    ) -> Tensor:
        return attend_in_context(
            self.attend,
            query,
            key,
            value,
            context,
            scale=self.scale,
            window=self.config.sliding_window,
            softcap=self.config.attention_softcap,
            sinks=None if self.sinks is None else self.sinks.weight,
            p=self.config.softmax_dropout,
            part=self.part[0],
        )


class SharedAttentionWithSinks(SharedAttention):
    """Attention over shared keys and values that may look at nothing."""

    shard_plan: ClassVar[Mapping[str, str] | None] = {
        "query": "column",
        "output": "row",
        "sinks": "column",
    }

    def __init__(
        self, config: SoftmaxAttentionConfig, settings: ModelSettings, kernels: KernelPolicy
    ) -> None:
        """Allocate without initialising; see `SharedAttention`."""
        super().__init__(config, settings, kernels)
        self.sinks = AttentionSinks(config.num_attention_heads, std=settings.initializer_range)


def _rotate(rope: Rope, x: Tensor, context: SequenceContext, channels: str) -> Tensor:
    """Rotate the heads of one tensor; the op takes two, of which the second may be small."""
    if context.rotary is None:
        return x
    return rope(x, x[:, :, :1], *context.rotary, channels=channels)[0]
