"""Softmax attention: multi-head, grouped-query and multi-query, causal, over one layout."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from lme_core.layers.context import SequenceContext
from lme_core.layers.dropout import check_probability, dropout
from lme_core.layers.initialization import Normal, ParameterSpec, linear_std
from lme_core.layers.linear import Linear
from lme_core.layers.normalization import Norm, build_head_norm
from lme_core.layers.settings import ModelSettings
from lme_core.mixers.attending import attend_in_context
from lme_core.mixers.base import LayerCache, SequenceMixer
from lme_kernels.ops.attention import ATTENTION
from lme_kernels.ops.qk_norm_rope import QK_NORM_ROPE
from lme_kernels.ops.rope import ROPE
from lme_kernels.policy import KernelPolicy

logger = logging.getLogger(__name__)

_OUTPUT_DROPOUT = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class SoftmaxAttentionConfig:
    """Causal softmax attention."""

    sequence_mixer_type: Literal["softmax_attention"] = "softmax_attention"
    """Kind of mixer."""
    num_attention_heads: int = 12
    """Query heads."""
    num_key_value_heads: int = 1
    """Heads of keys and values, each shared by an equal number of query heads: as many as query
    heads is multi-head attention, 1 is multi-query."""
    head_dim: int | None = None
    """Channels of a head; absent: `hidden_size` over `num_attention_heads`."""
    softmax_dropout: float = 0.0
    """Probability of dropping an attention weight; above 0 attention is computed explicitly, in
    memory that grows with the square of the sequence, in training."""
    dropout: float = 0.0
    """Probability of dropping a channel of the output."""
    add_bias: bool = False
    """Whether the projections have biases."""
    qkv_bias: bool | None = None
    """Whether the query, key and value projection has one; absent: as `add_bias`."""
    attention_multiplier: float | None = None
    """Factor of query times key; absent: as `attention_multiplier_method` says."""
    attention_multiplier_method: Literal["1 / sqrt(head_dim)", "1 / head_dim"] | None = None
    """Formula of that factor; absent: 1 / sqrt(head_dim) unless `attention_multiplier` is given."""
    attention_gate: bool = False
    """Whether the heads' output is multiplied by the sigmoid of a further projection."""
    exclusive_self_attention: bool = False
    """Whether each head's output loses its component along the token's own value."""
    qk_norm: bool = False
    """Whether queries and keys are RMS-normalised per head, with a learned scale, before RoPE."""
    qk_norm_across_heads: bool = False
    """Whether `qk_norm` is over the channels of all heads together, with a scale for each, as in
    OLMo 2."""
    rope_theta: float | None = None
    """Base of the rotary frequencies in this layer, which then are not rescaled; absent: those of
    the model."""
    sliding_window: int | None = None
    """Tokens that a token sees, itself among them; absent: all before it."""
    attention_softcap: float | None = None
    """Bound on the magnitude of scores, softcap * tanh(score / softcap); absent: none."""
    attention_sinks: bool = False
    """Whether each head has a learned score without a value, which takes its share of the
    softmax."""

    def __post_init__(self) -> None:
        for name, value in (
            ("num_attention_heads", self.num_attention_heads),
            ("num_key_value_heads", self.num_key_value_heads),
            ("head_dim", self.head_dim),
            ("sliding_window", self.sliding_window),
        ):
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"`num_attention_heads` must be a multiple of `num_key_value_heads`, got "
                f"{self.num_attention_heads} and {self.num_key_value_heads}"
            )
        if self.rope_theta is not None and self.rope_theta <= 0:
            raise ValueError(f"`rope_theta` must be above 0, got {self.rope_theta}")
        if self.qk_norm_across_heads and not self.qk_norm:
            raise ValueError("`qk_norm_across_heads` says how `qk_norm` is done, which is false")
        if self.qk_norm_across_heads and self.attention_sinks:
            raise ValueError("`qk_norm_across_heads` and `attention_sinks` exclude each other")
        check_probability("softmax_dropout", self.softmax_dropout)
        check_probability("dropout", self.dropout)
        if self.attention_softcap is not None and self.attention_softcap <= 0:
            raise ValueError(f"`attention_softcap` must be above 0, got {self.attention_softcap}")
        if self.attention_multiplier is not None and self.attention_multiplier_method is not None:
            raise ValueError(
                f"`attention_multiplier` ({self.attention_multiplier}) and "
                f"`attention_multiplier_method` ({self.attention_multiplier_method!r}) exclude "
                f"each other: leave one out"
            )

    def head_size(self, hidden_size: int) -> int:
        """Channels of a head in a model of that width.

        Raises:
            ValueError: If `head_dim` is absent and the heads do not divide the width.
        """
        if self.head_dim is not None:
            return self.head_dim
        if hidden_size % self.num_attention_heads:
            raise ValueError(
                f"`num_attention_heads` ({self.num_attention_heads}) must divide `hidden_size` "
                f"({hidden_size}) when `head_dim` is absent"
            )
        return hidden_size // self.num_attention_heads

    def check(self, settings: ModelSettings) -> None:
        """Check what depends on the architecture.

        Raises:
            ValueError: If `head_dim` is absent and the heads do not divide the width.
        """
        self.head_size(settings.hidden_size)

    def scale(self, hidden_size: int) -> float:
        """Factor of query times key in a model of that width."""
        if self.attention_multiplier is not None:
            return self.attention_multiplier
        size = self.head_size(hidden_size)
        return 1.0 / size if self.attention_multiplier_method == "1 / head_dim" else size**-0.5

    def has_dropout(self) -> bool:
        """Say whether anything is dropped in training."""
        return self.dropout > 0 or self.softmax_dropout > 0

    def rotary_dim(self, settings: ModelSettings) -> int | None:
        """Channels of a head, which is what rotates unless `rope_dim` says otherwise."""
        return self.head_size(settings.hidden_size)

    def forward_flops(self, settings: ModelSettings, sequence_length: int) -> float:
        """Floating-point operations of a forward pass, per token.

        Args:
            settings: The architecture.
            sequence_length: Tokens of a document; each sees those before it inside the window.
        """
        H, D = settings.hidden_size, self.head_size(settings.hidden_size)
        window = min(self.sliding_window or sequence_length, sequence_length)
        # Token i sees min(i + 1, window) tokens.
        seen = window - window * (window - 1) / (2 * sequence_length)
        query_rows = self.num_attention_heads * D * (2 if self.attention_gate else 1)
        rows = query_rows + 2 * self.num_key_value_heads * D
        projections = 2 * H * rows + 2 * H * self.num_attention_heads * D
        return projections + 4 * self.num_attention_heads * D * seen

    def build(
        self, settings: ModelSettings, layer: int, kernels: KernelPolicy
    ) -> "SoftmaxAttention":
        """Build the module of one layer.

        Args:
            settings: The architecture.
            layer: Index of the layer.
            kernels: Which implementations run.
        """
        if self.softmax_dropout > 0:
            logger.warning(
                "attention computed explicitly in training: layer=%d softmax_dropout=%g",
                layer,
                self.softmax_dropout,
            )
        if self.attention_sinks:
            return SoftmaxAttentionWithSinks(self, settings, kernels)
        if self.qk_norm_across_heads:
            return SoftmaxAttentionNormedAcrossHeads(self, settings, kernels)
        return SoftmaxAttention(self, settings, kernels)


@dataclass(slots=True)
class AttentionCache:
    """Keys and values of the tokens seen, in memory allocated once."""

    key: Tensor
    """Shape (B, max_length, K, D)."""
    value: Tensor
    """Shape (B, max_length, K, D)."""
    length: int = 0
    """Tokens seen, padding included."""

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add tokens.

        Args:
            key: Shape (B, S, K, D).
            value: Shape (B, S, K, D).

        Returns:
            All keys and values, shape (B, length, K, D).

        Raises:
            ValueError: If the cache is too short.
        """
        first, last = self.length, self.length + key.shape[1]
        if last > self.key.shape[1]:
            raise ValueError(
                f"the cache holds `max_length` = {self.key.shape[1]} tokens, got {last}"
            )
        self.key[:, first:last] = key
        self.value[:, first:last] = value
        self.length = last
        return self.key[:, :last], self.value[:, :last]

    def reorder(self, rows: Tensor) -> None:
        """Make row i what row `rows[i]` was."""
        self.key, self.value = self.key[rows], self.value[rows]


class SoftmaxAttention(SequenceMixer):
    """Causal softmax attention."""

    shard_plan: ClassVar[Mapping[str, str] | None] = {"qkv": "column", "output": "row"}

    attend: Callable[..., Tensor]
    """The attention op, (query, key, value, *, causal, scale, window, softcap, cu_seqlens, mask,
    sinks) -> output. Public so that sequences cut over devices can be served by another function."""

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
        N, K = config.num_attention_heads, config.num_key_value_heads
        self.config = config
        self.head_size = D
        self.num_key_value_heads = K
        self.shard_units = {"num_key_value_heads": K}
        self.queries_per_key = N // K
        self.scale = config.scale(H)
        self.eps = settings.layer_norm_epsilon
        self.rope_channels = settings.rope_channels
        # Rows go by key-value head, [its queries, key, value, their gates], so that dim 0 can be
        # cut between any two of those heads.
        row_heads = (2 if config.attention_gate else 1) * N + 2 * K
        self.qkv = Linear(
            H,
            row_heads * D,
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
        self.key_norm: Norm | None = None
        if config.qk_norm:
            together = (N, K) if config.qk_norm_across_heads else (1, 1)
            self.query_norm = build_head_norm(settings, together[0] * D, kernels)
            self.key_norm = build_head_norm(settings, together[1] * D, kernels)
        self.sinks: AttentionSinks | None = None
        self.attend = kernels.bind(ATTENTION)
        self.rope = kernels.bind(ROPE)
        self.norm_rope = kernels.bind(QK_NORM_ROPE)

    def forward(self, x: Tensor, context: SequenceContext, cache: LayerCache | None) -> Tensor:
        """Attend; see `SequenceMixer`."""
        G, D = self.queries_per_key, self.head_size
        sizes = [G * D, D, D] + ([G * D] if self.config.attention_gate else [])
        query, key, value, *gate = self.qkv(x).unflatten(-1, (-1, sum(sizes))).split(sizes, dim=-1)
        query = query.unflatten(-1, (G, D)).flatten(2, 3)
        query, key = self._place(query, key, context.rotary)
        own_value = value
        if cache is not None:
            key, value = cast(AttentionCache, cache).append(key, value)
        attended = self._attend(query, key, value, context)
        if self.config.exclusive_self_attention:
            attended = without_own_value(attended, own_value)
        if gate:
            gates = gate[0].unflatten(-1, (G, D)).flatten(2, 3)
            attended = attended * torch.sigmoid(gates)
        y = self.output(attended.flatten(2))
        if context.dropout_key is None or context.token_index is None:
            return y
        return dropout(
            y, self.config.dropout, context.dropout_key, _OUTPUT_DROPOUT, context.token_index
        )

    def new_cache(
        self, batch_size: int, max_length: int, *, device: torch.device, dtype: torch.dtype
    ) -> AttentionCache:
        """Make an empty cache; see `SequenceMixer`."""
        shape = (batch_size, max_length, self.num_key_value_heads, self.head_size)
        return AttentionCache(
            torch.zeros(shape, device=device, dtype=dtype),
            torch.zeros(shape, device=device, dtype=dtype),
        )

    def _place(
        self, query: Tensor, key: Tensor, rotary: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        """Normalise and rotate queries and keys, where the model does."""
        if rotary is None:
            if self.query_norm is None or self.key_norm is None:
                return query, key
            return self.query_norm(query), self.key_norm(key)
        if self.query_norm is None or self.key_norm is None:
            return self.rope(query, key, *rotary, channels=self.rope_channels)
        return self.norm_rope(
            query,
            key,
            self.query_norm.factors(),
            self.key_norm.factors(),
            *rotary,
            eps=self.eps,
            channels=self.rope_channels,
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


class AttentionSinks(nn.Module):
    """A score for each head that takes its share of the softmax and has no value."""

    def __init__(self, heads: int, *, std: float) -> None:
        """Allocate without initialising.

        Args:
            heads: Query heads.
            std: Standard deviation of the initial scores.
        """
        super().__init__()
        self.std = std
        self.weight = nn.Parameter(torch.empty(heads))

    def parameter_specs(self) -> Mapping[str, ParameterSpec]:
        """Spec of `weight`, which is not decayed."""
        return {"weight": ParameterSpec(Normal(self.std), weight_decay=False)}


class SoftmaxAttentionWithSinks(SoftmaxAttention):
    """Causal softmax attention that may look at nothing, as in gpt-oss."""

    shard_plan: ClassVar[Mapping[str, str] | None] = {
        "qkv": "column",
        "output": "row",
        "sinks": "column",
    }

    def __init__(
        self, config: SoftmaxAttentionConfig, settings: ModelSettings, kernels: KernelPolicy
    ) -> None:
        """Allocate without initialising; see `SoftmaxAttention`."""
        super().__init__(config, settings, kernels)
        std = settings.initializer_range
        self.sinks = AttentionSinks(config.num_attention_heads, std=std)


class SoftmaxAttentionNormedAcrossHeads(SoftmaxAttention):
    """Causal softmax attention whose queries and keys are normalised over all heads together."""

    shard_plan: ClassVar[Mapping[str, str] | None] = {
        "qkv": "column",
        "output": "row",
        "query_norm": "column",
        "key_norm": "column",
    }

    def _place(
        self, query: Tensor, key: Tensor, rotary: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        if self.query_norm is None or self.key_norm is None:
            raise RuntimeError("queries and keys of such a layer are normalised")
        query = self.query_norm(query.flatten(2)).unflatten(2, query.shape[2:])
        key = self.key_norm(key.flatten(2)).unflatten(2, key.shape[2:])
        if rotary is None:
            return query, key
        return self.rope(query, key, *rotary, channels=self.rope_channels)


def without_own_value(attended: Tensor, value: Tensor) -> Tensor:
    """Remove from each head's output its component along the token's own value.

    Args:
        attended: Shape (B, S, N, D).
        value: Shape (B, S, K, D).

    Returns:
        Shape (B, S, N, D): o - ((o . v) / (v . v)) v, in at least float32.
    """
    compute = torch.promote_types(attended.dtype, torch.float32)
    o = attended.unflatten(2, (value.shape[2], -1)).to(compute)
    v = value.unsqueeze(3).to(compute)
    share = (o * v).sum(-1, keepdim=True) / (v * v).sum(-1, keepdim=True)
    return (o - share * v).to(attended.dtype).flatten(2, 3)
