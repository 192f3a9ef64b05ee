"""Attention whose keys and values are made of a few channels, which is all that a cache keeps."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, cast

import torch
from torch import Tensor

from lme_core.layers.context import SequenceContext
from lme_core.layers.dropout import check_probability, dropout
from lme_core.layers.initialization import linear_std
from lme_core.layers.linear import Linear
from lme_core.layers.normalization import Norm
from lme_core.layers.settings import ModelSettings, Normalization
from lme_core.mixers.attending import attend_in_context
from lme_core.mixers.base import LayerCache, SequenceMixer
from lme_core.mixers.checks import check_positive
from lme_kernels.ops.attention import ATTENTION
from lme_kernels.ops.rope import ROPE
from lme_kernels.policy import KernelPolicy

_OUTPUT_DROPOUT = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class MultiheadLatentAttentionConfig:
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434)."""

    sequence_mixer_type: Literal["multihead_latent_attention"] = "multihead_latent_attention"
    """Kind of mixer."""
    num_attention_heads: int
    """Heads."""
    head_dim: int
    """Channels of a head's query and key that do not rotate."""
    query_compression_size: int | None
    """Channels that queries are made of; null: made of the block's input."""
    key_value_compression_size: int
    """Channels that keys are made of, and as many others for values."""
    share_compression: bool = False
    """Whether keys and values are made of the same channels, as in DeepSeek, not each of its
    own."""
    rope_head_dim: int | None = None
    """Further channels of a head's query and key that rotate, the key's one for all heads; absent:
    none, as it must be without RoPE."""
    value_head_dim: int | None = None
    """Channels of a head's value; absent: `head_dim`."""
    softmax_dropout: float = 0.0
    """Probability of dropping an attention weight; above 0 attention is computed explicitly, in
    memory that grows with the square of the sequence, in training."""
    dropout: float = 0.0
    """Probability of dropping a channel of the output."""
    add_bias: bool = False
    """Whether the projections have biases."""
    attention_multiplier: float | None = None
    """Factor of query times key; absent: 1 / sqrt of the channels of a head's key."""
    sliding_window: int | None = None
    """Tokens that a token sees, itself among them; absent: all before it."""
    normalization_function: Normalization = "layernorm"
    """Norm of the compressed channels."""
    normalization_epsilon: float | None = None
    """Epsilon of that norm; absent: `layer_norm_epsilon` of the model."""

    def __post_init__(self) -> None:
        check_positive(
            {
                "num_attention_heads": self.num_attention_heads,
                "head_dim": self.head_dim,
                "query_compression_size": self.query_compression_size,
                "key_value_compression_size": self.key_value_compression_size,
                "rope_head_dim": self.rope_head_dim,
                "value_head_dim": self.value_head_dim,
                "sliding_window": self.sliding_window,
            }
        )
        if self.normalization_epsilon is not None and self.normalization_epsilon <= 0:
            raise ValueError(
                f"`normalization_epsilon` must be above 0, or absent for that of the model; got "
                f"{self.normalization_epsilon}"
            )
        check_probability("softmax_dropout", self.softmax_dropout)
        check_probability("dropout", self.dropout)

    def check(self, settings: ModelSettings) -> None:
        """Check what depends on the architecture.

        Raises:
            ValueError: If there are channels that rotate without RoPE, or none with it.
        """
        if (settings.position_embedding_type == "rope") != (self.rope_head_dim is not None):
            raise ValueError(
                f"`rope_head_dim` goes with `position_embedding_type: rope` and with nothing else, "
                f"got {self.rope_head_dim} and `{settings.position_embedding_type}`"
            )

    def has_dropout(self) -> bool:
        """Say whether anything is dropped in training."""
        return self.dropout > 0 or self.softmax_dropout > 0

    def rotary_dim(self, settings: ModelSettings) -> int | None:
        """Channels of a head that rotate."""
        return self.rope_head_dim

    def value_size(self) -> int:
        """Channels of a head's value."""
        return self.head_dim if self.value_head_dim is None else self.value_head_dim

    def key_size(self) -> int:
        """Channels of a head's key, those that rotate among them."""
        return self.head_dim + (self.rope_head_dim or 0)

    def latent_size(self) -> int:
        """Channels that keys and values are made of together."""
        return self.key_value_compression_size * (1 if self.share_compression else 2)

    def forward_flops(self, settings: ModelSettings, sequence_length: int) -> float:
        """Floating-point operations of a forward pass, per token.

        Args:
            settings: The architecture.
            sequence_length: Tokens of a document; each sees those before it inside the window.
        """
        H, N = settings.hidden_size, self.num_attention_heads
        keys, values = N * self.key_size(), N * self.value_size()
        window = min(self.sliding_window or sequence_length, sequence_length)
        # Token i sees min(i + 1, window) tokens.
        seen = window - window * (window - 1) / (2 * sequence_length)
        compressed = self.query_compression_size
        queries = H * keys if compressed is None else compressed * (H + keys)
        latent = H * (self.latent_size() + (self.rope_head_dim or 0))
        expanded = self.key_value_compression_size * (N * self.head_dim + values)
        return 2 * (queries + latent + expanded + H * values) + 2 * (keys + values) * seen

    def build(
        self, settings: ModelSettings, layer: int, kernels: KernelPolicy
    ) -> "MultiheadLatentAttention":
        """Build the module of one layer.

        Args:
            settings: The architecture.
            layer: Index of the layer.
            kernels: Which implementations run.
        """
        return MultiheadLatentAttention(self, settings, kernels)


@dataclass(slots=True)
class LatentCache:
    """Compressed channels of the tokens seen, in memory allocated once."""

    latent: Tensor
    """Shape (B, max_length, C): what keys and values are made of, then the key that rotated."""
    length: int = 0
    """Tokens seen, padding included."""

    def append(self, latent: Tensor) -> Tensor:
        """Add tokens.

        Args:
            latent: Shape (B, S, C).

        Returns:
            Those of all tokens, shape (B, length, C).

        Raises:
            ValueError: If the cache is too short.
        """
        first, last = self.length, self.length + latent.shape[1]
        if last > self.latent.shape[1]:
            raise ValueError(
                f"the cache holds `max_length` = {self.latent.shape[1]} tokens, got {last}"
            )
        self.latent[:, first:last] = latent
        self.length = last
        return self.latent[:, :last]

    def reorder(self, rows: Tensor) -> None:
        """Make row i what row `rows[i]` was."""
        self.latent = self.latent[rows]


class MultiheadLatentAttention(SequenceMixer):
    """Causal softmax attention over keys and values made of compressed channels."""

    shard_plan: ClassVar[Mapping[str, str] | None] = {
        "query_up": "column",
        "key_up": "column",
        "value_up": "column",
        "output": "row",
    }

    attend: Callable[..., Tensor]
    """The attention op, (query, key, value, *, causal, scale, window, cu_seqlens, mask) -> output.
    Public so that sequences cut over devices can be served by another function."""

    def __init__(
        self,
        config: MultiheadLatentAttentionConfig,
        settings: ModelSettings,
        kernels: KernelPolicy,
    ) -> None:
        """Allocate without initialising.

        Args:
            config: What this layer's attention is.
            settings: The architecture.
            kernels: Which implementations run.
        """
        super().__init__()
        H, N = settings.hidden_size, config.num_attention_heads
        keys, values = config.head_dim, config.value_size()
        rotary, compressed = config.rope_head_dim or 0, config.query_compression_size
        self.config = config
        self.shard_units = {"num_attention_heads": N}
        self.scale = config.key_size() ** -0.5
        if config.attention_multiplier is not None:
            self.scale = config.attention_multiplier
        self.latent_sizes = [config.latent_size(), rotary]

        def linear(inputs: int, outputs: int) -> Linear:
            std = linear_std(settings, inputs)
            return Linear(inputs, outputs, bias=config.add_bias, std=std, mup=True)

        eps = config.normalization_epsilon
        eps = settings.layer_norm_epsilon if eps is None else eps

        def norm(size: int) -> Norm:
            return Norm(
                config.normalization_function,
                size,
                eps=eps,
                p=settings.p_norm_order,
                zero_centered=settings.zero_centered_norms,
                kernels=kernels,
            )

        self.query_down = None if compressed is None else linear(H, compressed)
        self.query_norm = None if compressed is None else norm(compressed)
        # Rows by head, [channels that stay, channels that rotate].
        self.query_up = linear(compressed or H, N * config.key_size())
        # Rows: what keys are made of, what values are (once if shared), the key that rotates.
        self.key_value_down = linear(H, sum(self.latent_sizes))
        self.key_value_norm = norm(config.latent_size())
        self.key_up = linear(config.key_value_compression_size, N * keys)
        self.value_up = linear(config.key_value_compression_size, N * values)
        self.output = Linear(
            N * values,
            H,
            bias=config.add_bias,
            std=linear_std(settings, N * values, output=True),
            mup=True,
        )
        self.attend = kernels.bind(ATTENTION)
        self.rope = kernels.bind(ROPE)

    def forward(self, x: Tensor, context: SequenceContext, cache: LayerCache | None) -> Tensor:
        """Attend; see `SequenceMixer`."""
        compressed = x
        if self.query_down is not None and self.query_norm is not None:
            compressed = self.query_norm(self.query_down(x))
        query = self.query_up(compressed).unflatten(-1, (-1, self.config.key_size()))
        latent, rotating = self.key_value_down(x).split(self.latent_sizes, dim=-1)
        latent = self.key_value_norm(latent)
        stays, turns = query.split([self.config.head_dim, self.latent_sizes[1]], dim=-1)
        rotating = rotating[:, :, None]
        if context.rotary is not None:
            turns, rotating = self.rope(turns, rotating, *context.rotary)
        if cache is None:
            query = torch.cat((stays, turns), dim=-1)
            attended = self._expanded(query, latent, rotating, context)
        else:
            kept = cast(LatentCache, cache).append(torch.cat((latent, rotating[:, :, 0]), dim=-1))
            attended = self._compressed(stays, turns, kept, context)
        y = self.output(attended.flatten(2))
        if context.dropout_key is None or context.token_index is None:
            return y
        return dropout(
            y, self.config.dropout, context.dropout_key, _OUTPUT_DROPOUT, context.token_index
        )

    def new_cache(
        self, batch_size: int, max_length: int, *, device: torch.device, dtype: torch.dtype
    ) -> LatentCache:
        """Make an empty cache; see `SequenceMixer`."""
        shape = (batch_size, max_length, sum(self.latent_sizes))
        return LatentCache(torch.zeros(shape, device=device, dtype=dtype))

    def _expanded(
        self, query: Tensor, latent: Tensor, rotating: Tensor, context: SequenceContext
    ) -> Tensor:
        """Make every head's keys and values of the compressed channels, and attend to them."""
        of_keys, of_values = self._parts(latent)
        key = self.key_up(of_keys).unflatten(-1, (-1, self.config.head_dim))
        value = self.value_up(of_values).unflatten(-1, (-1, self.config.value_size()))
        key = torch.cat((key, rotating.expand(-1, -1, key.shape[2], -1)), dim=-1)
        return self._attend(query, key, value, context)

    def _compressed(
        self, stays: Tensor, turns: Tensor, kept: Tensor, context: SequenceContext
    ) -> Tensor:
        """Attend to the compressed channels themselves, one key for all heads.

        `key_up` goes to the queries and `value_up` behind the softmax, so that no token seen
        before is expanded again. The bias of `key_up` is left out: it adds the same to all scores
        of a query. Weights add up to one, so the bias of `value_up` is added once.
        """
        latent, rotating = kept.split(self.latent_sizes, dim=-1)
        of_keys, of_values = self._parts(latent)
        up = self.key_up.weight.unflatten(0, (-1, self.config.head_dim))
        query = torch.cat((torch.einsum("bsnd,ndc->bsnc", stays, up), turns), dim=-1)
        key = torch.cat((of_keys, rotating), dim=-1)[:, :, None]
        read = self._attend(query, key, of_values[:, :, None], context)
        up = self.value_up.weight.unflatten(0, (-1, self.config.value_size()))
        attended = torch.einsum("bsnc,nvc->bsnv", read, up)
        if self.value_up.bias is None:
            return attended
        return attended + self.value_up.bias.unflatten(0, (-1, self.config.value_size()))

    def _parts(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """What keys are made of, and what values are."""
        if self.config.share_compression:
            return latent, latent
        of_keys, of_values = latent.chunk(2, dim=-1)
        return of_keys, of_values

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
            p=self.config.softmax_dropout,
            part=self.part[0],
        )
