"""Linear attention: a memory to which each token adds its key and value."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from lme_core.layers.context import SequenceContext
from lme_core.layers.initialization import linear_std
from lme_core.layers.linear import Linear
from lme_core.layers.settings import ModelSettings, Normalization
from lme_core.mixers.base import LayerCache
from lme_core.mixers.checks import check_positive, common_heads, head_units
from lme_core.mixers.gated_norm import GatedNorm
from lme_core.mixers.recurrent import RecurrentMixer, RecurrentMixerConfig
from lme_core.mixers.short_convolution import (
    ShortConvolution,
    check_kernel_size,
    check_plain_activation,
)
from lme_kernels.ops.linear_attention import LINEAR_ATTENTION
from lme_kernels.policy import KernelPolicy

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearAttentionConfig(RecurrentMixerConfig):
    """Linear attention (Katharopoulos et al. 2020, arXiv:2006.16236), without a normaliser."""

    sequence_mixer_type: Literal["linear_attention"] = "linear_attention"
    """Kind of mixer."""
    k_head_dim: int
    """Channels of a query or key."""
    v_head_dim: int
    """Channels of a value."""
    num_q_heads: int
    """Heads of queries. The largest number of heads is that of the memory; each head of fewer
    serves as many neighbours."""
    num_k_heads: int
    """Heads of keys."""
    num_v_heads: int
    """Heads of values."""
    num_g_heads: int
    """Heads of the gate, whose silu multiplies the output."""
    kernel_size: int | None = None
    """Tokens that a convolution of queries, keys and values sees, at least 2; null for none."""
    activation_function: str | None = None
    """Function after the convolution; null for none, as it must be without a convolution."""
    add_bias: bool = False
    """Whether the input projection and the convolution have biases."""
    normalization_function: Normalization | None = None
    """Norm of the gated output; null for none."""
    attention_multiplier: float | None = None
    """Factor of what is read from the memory; null: 1 / sqrt(k_head_dim)."""
    A_init_min: float | None = None
    """Accepted for old files; without effect: this memory does not decay."""
    A_init_max: float | None = None
    """Accepted for old files; without effect."""
    dt_init_min: float | None = None
    """Accepted for old files; without effect."""
    dt_init_max: float | None = None
    """Accepted for old files; without effect."""
    dt_init_floor: float | None = None
    """Accepted for old files; without effect."""

    def __post_init__(self) -> None:
        check_positive({"k_head_dim": self.k_head_dim, "v_head_dim": self.v_head_dim})
        self.num_heads()
        check_kernel_size(self.kernel_size)
        check_plain_activation(self.activation_function)
        if self.kernel_size is None and self.activation_function is not None:
            raise ValueError(
                f"`activation_function` must be null without `kernel_size`, got "
                f"`{self.activation_function}`"
            )
        for name, value in (
            ("A_init_min", self.A_init_min),
            ("A_init_max", self.A_init_max),
            ("dt_init_min", self.dt_init_min),
            ("dt_init_max", self.dt_init_max),
            ("dt_init_floor", self.dt_init_floor),
        ):
            if value is not None:
                logger.warning("setting without effect in linear_attention: %s=%g", name, value)

    def num_heads(self) -> int:
        """Heads of the memory.

        Raises:
            ValueError: If a number of heads does not divide it.
        """
        return common_heads(self.head_counts())

    def head_counts(self) -> Mapping[str, int]:
        """Numbers of heads by their settings' names."""
        return {
            "num_q_heads": self.num_q_heads,
            "num_k_heads": self.num_k_heads,
            "num_v_heads": self.num_v_heads,
            "num_g_heads": self.num_g_heads,
        }

    def sizes(self) -> list[int]:
        """Widths of queries, keys, values and gates."""
        return [
            self.num_q_heads * self.k_head_dim,
            self.num_k_heads * self.k_head_dim,
            self.num_v_heads * self.v_head_dim,
            self.num_g_heads * self.v_head_dim,
        ]

    def forward_flops(self, settings: ModelSettings, sequence_length: int) -> float:
        """Floating-point operations of a forward pass, per token.

        Counted are the projections, the convolution, and the two products with the memory.

        Args:
            settings: The architecture.
            sequence_length: Tokens of a document; each costs the same.
        """
        width, sizes = self.num_heads() * self.v_head_dim, self.sizes()
        projections = 2 * settings.hidden_size * (sum(sizes) + width)
        convolution = 2 * sum(sizes[:3]) * (self.kernel_size or 0)
        return float(projections + convolution + 4 * width * self.k_head_dim)

    def build(
        self, settings: ModelSettings, layer: int, kernels: KernelPolicy
    ) -> "LinearAttention":
        """Build the module of one layer.

        Args:
            settings: The architecture.
            layer: Index of the layer.
            kernels: Which implementations run.
        """
        return LinearAttention(self, settings, kernels)


class LinearAttention(RecurrentMixer):
    """Projection, convolution, linear attention, gated norm, projection."""

    shard_plan: ClassVar[Mapping[str, str] | None] = {
        "input": "column",
        "convolution": "column",
        "norm": "column",
        "output": "row",
    }

    def __init__(
        self, config: LinearAttentionConfig, settings: ModelSettings, kernels: KernelPolicy
    ) -> None:
        """Allocate without initialising.

        Args:
            config: What this layer is.
            settings: The architecture.
            kernels: Which implementations run.
        """
        super().__init__(kernels)
        H, N, sizes = settings.hidden_size, config.num_heads(), config.sizes()
        width = N * config.v_head_dim
        self.config = config
        # Rows of the projection: queries, keys, values, gates.
        self.qkv_sizes = sizes[:3]
        self.sizes = [sum(sizes[:3]), sizes[3]]
        self.num_heads = N
        self.shard_sections = {"input": sizes, "convolution": self.qkv_sizes}
        keys, values = config.k_head_dim, config.v_head_dim
        self.shard_units = head_units(
            config.head_counts(),
            {
                "num_q_heads": keys,
                "num_k_heads": keys,
                "num_v_heads": values,
                "num_g_heads": values,
            },
        )
        self.input = Linear(
            H, sum(sizes), bias=config.add_bias, std=linear_std(settings, H), mup=True
        )
        if config.kernel_size is not None:
            self.convolution = ShortConvolution(
                self.sizes[0],
                config.kernel_size,
                bias=config.add_bias,
                activation=config.activation_function,
                settings=settings,
                kernels=kernels,
            )
        self.norm = GatedNorm(
            config.normalization_function, width, settings=settings, kernels=kernels
        )
        self.output = Linear(
            width, H, bias=False, std=linear_std(settings, width, output=True), mup=True
        )
        self.attend_linearly = kernels.bind(LINEAR_ATTENTION)
        self.state_shape = (N, config.k_head_dim, config.v_head_dim)

    def forward(self, x: Tensor, context: SequenceContext, cache: LayerCache | None) -> Tensor:
        """Mix along the sequence; see `SequenceMixer`."""
        config = self.config
        sequences = self.sequences(x, context, cache)
        tokens, N = self.pack(self.input(x), sequences), self.num_heads
        qkv, gate = tokens.split(self.here(self.sizes), dim=-1)
        qkv = self.convolve(qkv, sequences, cache)
        query, key, value = qkv.split(self.here(self.qkv_sizes), dim=-1)
        query = self.heads_here(query, config.num_q_heads, serve=N)
        key = self.heads_here(key, config.num_k_heads, serve=N)
        value = self.heads_here(value, config.num_v_heads, serve=N)

        # Quoted: some versions of torch cannot trace the making of a union.
        def run(initial: "Tensor | None") -> tuple[Tensor, Tensor]:
            return self.attend_linearly(
                query,
                key,
                value,
                scale=config.attention_multiplier,
                initial_state=initial,
                return_final_state=True,
                cu_seqlens=sequences.cu_seqlens,
                chunk_size=sequences.chunk_size(64),
            )

        # The state keeps all it has: the logarithm of one.
        (here,) = self.here([N])
        kept = value.new_zeros((*value.shape[:-2], here))
        y = self.recur(run, sequences, cache, kept)
        gate = self.heads_here(gate, config.num_g_heads, serve=N)
        gate = gate.repeat_interleave(here // gate.shape[-2], dim=-2).flatten(-2)
        return self.output(self.unpack(self.norm(y.flatten(-2), gate), sequences))
