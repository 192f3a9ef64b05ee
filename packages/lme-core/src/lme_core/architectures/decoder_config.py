"""The fields that all decoders share, and what their combinations must satisfy."""

import logging
from dataclasses import dataclass
from typing import ClassVar

from lme_core.layers.dropout import check_probability
from lme_core.layers.rotary import RopeScalingField, Rotary
from lme_core.layers.settings import (
    InitMethod,
    Normalization,
    PositionEmbedding,
    RopeChannels,
)
from lme_core.mixers import MixerConfig
from lme_core.mixers.softmax_attention import SoftmaxAttentionConfig
from lme_core.mlps import MLPConfig
from lme_core.mlps.dense import DenseMLPConfig
from lme_core.mlps.none import NoMLPConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderConfig:
    """What a decoder is: its widths, its blocks, its embeddings and how it starts."""

    vocab_size: int = 50304
    """Number of token ids."""
    max_position_embeddings: int = 2048
    """Longest sequence, in tokens: rows of learned positions; with RoPE a statement only."""
    hidden_size: int = 768
    """Width of the residual stream."""
    num_layers: int = 12
    """Number of blocks."""
    sequence_mixer_blocks: tuple[MixerConfig, ...] | None = None
    """Sequence mixer of each layer; one entry stands for every layer."""
    mlp_blocks: tuple[MLPConfig, ...] | None = None
    """MLP of each layer; one entry stands for every layer."""
    embedding_dropout: float = 0.0
    """Probability of dropping a channel of the embedding."""
    normalization_function: Normalization = "rmsnorm"
    """Kind of the norms."""
    layer_norm_epsilon: float = 1e-5
    """Epsilon of the norms."""
    zero_centered_norms: bool = False
    """Whether norms of the residual stream, of queries, keys and compressed channels hold the
    distance of their factors from 1, as in Gemma and Qwen3-Next."""
    p_norm_order: float = 2.0
    """The p of `p_norm`."""
    position_embedding_type: PositionEmbedding = "rope"
    """How the model knows positions: rotation, a learned table, or not at all."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""
    rope_scaling: RopeScalingField = None
    """How rotary frequencies are changed for longer contexts: `rope_type` (or `type`) is `linear`,
    `llama3` or `yarn`; a mapping without a kind is YaRN."""
    rope_dim: int | None = None
    """Channels of a head that rotate; absent: all."""
    rope_channels: RopeChannels = "last"
    """Which channels of a head rotate where not all do."""
    m_emb: float | None = None
    """Factor of the embedding; absent: 1."""
    m_residual: float | None = None
    """Factor of what a block adds to the residual stream; absent: 1."""
    m_width: float | None = None
    """Divisor of the logits, and the width factor of `mup`; absent: 1."""
    logit_softcap: float | None = None
    """Bound on the magnitude of logits, softcap * tanh(logit / softcap); absent: none."""
    initializer_range: float = 0.02
    """Base standard deviation of initial weights."""
    init_method: InitMethod = "normal"
    """Standard deviation inside blocks: the range, the range / sqrt(`m_width`) (`mup`), or
    1 / sqrt(inputs of the layer) (`fan_in`)."""
    embedding_init_method: InitMethod = "normal"
    """Standard deviation of the embedding: the range, or 1 / sqrt(`hidden_size`) (`fan_in`)."""
    use_depth_scaled_init: bool = True
    """Whether layers that write to the residual stream start smaller by sqrt(2 `num_layers`)."""
    tie_word_embeddings: bool = False
    """Whether the output layer is the embedding."""
    bos_token_id: int | None = None
    """Id of the beginning of a sequence; absent: the tokenizer's."""
    eos_token_id: int | tuple[int, ...] | None = None
    """Id of the end of a document, or several; absent: the tokenizer's."""
    pad_token_id: int | None = None
    """Id of padding; absent: the tokenizer's."""
    router_aux_loss_coef: float | None = 0.001
    """Weight of the load-balancing loss of mixtures of experts; null for none."""
    router_z_loss_coef: float | None = None
    """Weight of the loss that keeps the logits of routers small; null for none."""
    use_cache: bool | None = None
    """Accepted for old files; without effect: generation always caches, training never."""

    may_lack_mlps: ClassVar[bool] = False
    """Whether blocks may be a sequence mixer alone."""

    def __post_init__(self) -> None:
        for name, value in (
            ("vocab_size", self.vocab_size),
            ("max_position_embeddings", self.max_position_embeddings),
            ("hidden_size", self.hidden_size),
            ("num_layers", self.num_layers),
        ):
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}")
        check_probability("embedding_dropout", self.embedding_dropout)
        self._check_token_ids()
        self._check_blocks()
        self._check_multipliers()
        if self.position_embedding_type == "rope":
            self._check_rope()
        if self.use_cache is not None:
            logger.warning("setting without effect: use_cache=%s", self.use_cache)

    def mixers(self) -> tuple[MixerConfig, ...]:
        """Sequence mixer of each layer, `num_layers` entries."""
        blocks = self.sequence_mixer_blocks or (SoftmaxAttentionConfig(),)
        return blocks * self.num_layers if len(blocks) == 1 else blocks

    def mlps(self) -> tuple[MLPConfig, ...]:
        """MLP of each layer, `num_layers` entries."""
        blocks = self.mlp_blocks or (DenseMLPConfig(),)
        return blocks * self.num_layers if len(blocks) == 1 else blocks

    def has_dropout(self) -> bool:
        """Say whether anything in the blocks is dropped in training."""
        return any(block.has_dropout() for block in (*self.mixers(), *self.mlps()))

    def auxiliary_weights(self) -> dict[str, float]:
        """Coefficients of the auxiliary losses of the model, by name."""
        return {
            "router_aux_loss": self.router_aux_loss_coef or 0.0,
            "router_z_loss": self.router_z_loss_coef or 0.0,
        }

    def block_flops(self, sequence_length: int) -> float:
        """Floating-point operations of all blocks in a forward pass, per token.

        Args:
            sequence_length: Tokens of a sequence, taken as one document.
        """
        return sum(
            mixer.forward_flops(self, sequence_length) + mlp.forward_flops(self, sequence_length)
            for mixer, mlp in zip(self.mixers(), self.mlps(), strict=True)
        )

    def rotary_dim(self) -> int | None:
        """Channels of a head that rotate; `None` where none do.

        Raises:
            ValueError: If `rope_dim` is absent and the layers do not agree on a head size.
        """
        if self.position_embedding_type != "rope":
            return None
        if self.rope_dim is not None:
            return self.rope_dim
        # Mixers that know the order of tokens by themselves have none.
        sizes = {mixer.rotary_dim(self) for mixer in self.mixers()} - {None}
        if len(sizes) > 1:
            raise ValueError(
                f"`rope_dim` must be given when layers differ in head size, here "
                f"{', '.join(sorted(map(str, sizes)))}"
            )
        return sizes.pop() if sizes else None

    def rotary(self) -> Rotary | None:
        """Tables for this model's positions; `None` without RoPE."""
        dim = self.rotary_dim()
        return None if dim is None else Rotary(dim, self.rope_theta, self.rope_scaling)

    def rotary_of_layers(self) -> dict[int, Rotary]:
        """Tables of the layers that have a base of their own, one for all that share it."""
        dim = self.rotary_dim()
        if dim is None:
            return {}
        bases = {
            layer: mixer.rope_theta
            for layer, mixer in enumerate(self.mixers())
            if isinstance(mixer, SoftmaxAttentionConfig) and mixer.rope_theta is not None
        }
        tables = {base: Rotary(dim, base) for base in bases.values()}
        return {layer: tables[base] for layer, base in bases.items()}

    def _check_token_ids(self) -> None:
        ends = self.eos_token_id if isinstance(self.eos_token_id, tuple) else (self.eos_token_id,)
        for name, value in (
            ("bos_token_id", self.bos_token_id),
            *(("eos_token_id", end) for end in ends),
            ("pad_token_id", self.pad_token_id),
        ):
            if value is not None and not 0 <= value < self.vocab_size:
                raise ValueError(
                    f"`{name}` must be at least 0 and below `vocab_size` ({self.vocab_size}), "
                    f"got {value}"
                )

    def _check_blocks(self) -> None:
        for name, blocks in (
            ("sequence_mixer_blocks", self.sequence_mixer_blocks),
            ("mlp_blocks", self.mlp_blocks),
        ):
            if blocks is not None and len(blocks) not in (1, self.num_layers):
                raise ValueError(
                    f"`{name}` must have 1 entry, which stands for every layer, or `num_layers` "
                    f"({self.num_layers}) entries, got {len(blocks)}"
                )
        for layer, mlp in enumerate(self.mlps()):
            if isinstance(mlp, NoMLPConfig) and not self.may_lack_mlps:
                raise ValueError(
                    f"`mlp_blocks[{layer}].mlp_type` must be MLP or MoE in this architecture, got "
                    f"none: take `model_type: gpt_base`"
                )
        for layer, mixer in enumerate(self.mixers()):
            try:
                mixer.check(self)
            except ValueError as error:
                raise ValueError(f"`sequence_mixer_blocks[{layer}]`: {error}") from error

    def _check_multipliers(self) -> None:
        for name, value in (
            ("m_emb", self.m_emb),
            ("m_residual", self.m_residual),
            ("m_width", self.m_width),
            ("logit_softcap", self.logit_softcap),
            ("initializer_range", self.initializer_range),
            ("layer_norm_epsilon", self.layer_norm_epsilon),
            ("rope_theta", self.rope_theta),
        ):
            if value is not None and value <= 0:
                raise ValueError(f"`{name}` must be above 0, got {value}")
        for name, value in (
            ("router_aux_loss_coef", self.router_aux_loss_coef),
            ("router_z_loss_coef", self.router_z_loss_coef),
        ):
            if value is not None and value < 0:
                raise ValueError(f"`{name}` must be at least 0, or null for none; got {value}")
        if self.p_norm_order < 1:
            raise ValueError(f"`p_norm_order` must be at least 1, got {self.p_norm_order}")
        if self.init_method == "mup" and self.m_width is None:
            raise ValueError("`init_method: mup` needs `m_width`, the width factor; it is absent")

    def _check_rope(self) -> None:
        dim = self.rotary_dim()
        if dim is None:
            return
        if dim < 2 or dim % 2:
            raise ValueError(
                f"`rope_dim` must be even and at least 2, got {dim}"
                + ("" if self.rope_dim else ", the head size: set `rope_dim` or `head_dim`")
            )
        for layer, mixer in enumerate(self.mixers()):
            size = mixer.rotary_dim(self)
            if size is not None and dim > size:
                raise ValueError(
                    f"`rope_dim` ({dim}) must be at most the head size ({size}) of layer {layer}"
                )
