"""Gated DeltaNet: a memory that each token corrects, and that decays."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lme_core.layers.context import SequenceContext
from lme_core.layers.initialization import linear_std
from lme_core.layers.linear import Linear
from lme_core.layers.settings import ModelSettings
from lme_core.mixers.base import LayerCache
from lme_core.mixers.checks import check_positive, head_units
from lme_core.mixers.decay_gate import DecayGate, DecayGateFields
from lme_core.mixers.gated_norm import GatedNorm
from lme_core.mixers.recurrent import RecurrentMixer, RecurrentMixerConfig
from lme_core.mixers.short_convolution import ShortConvolution, check_kernel_size
from lme_kernels.ops.gated_delta_rule import GATED_DELTA_RULE
from lme_kernels.policy import KernelPolicy


@dataclass(frozen=True, slots=True, kw_only=True)
class GatedDeltaNetConfig(RecurrentMixerConfig, DecayGateFields):
    """Gated DeltaNet (Yang et al. 2024, arXiv:2412.06464)."""

    sequence_mixer_type: Literal["gated_deltanet"] = "gated_deltanet"
    """Kind of mixer."""
    k_head_dim: int
    """Channels of a query or key."""
    v_head_dim: int
    """Channels of a value."""
    num_k_heads: int
    """Heads of queries and keys."""
    num_v_heads: int
    """Heads of values, a multiple of `num_k_heads`."""
    use_gate: bool
    """Whether the output is multiplied by the silu of a further projection."""
    attention_multiplier: float | None = None
    """Factor of what is read from the memory; null: 1 / sqrt(k_head_dim)."""
    allow_neg_eigval: bool
    """Whether writing is up to twice as strong, so that the memory can change sign along a key."""
    kernel_size: int
    """Tokens that the convolution before the memory sees, at least 2."""
    norm_before_gate: bool = False
    """Whether the gate multiplies what is normalised already, as in Qwen3-Next."""

    def __post_init__(self) -> None:
        check_positive(
            {
                "k_head_dim": self.k_head_dim,
                "v_head_dim": self.v_head_dim,
                "num_k_heads": self.num_k_heads,
                "num_v_heads": self.num_v_heads,
            }
        )
        if self.num_v_heads % self.num_k_heads:
            raise ValueError(
                f"`num_v_heads` must be a multiple of `num_k_heads`, got {self.num_v_heads} and "
                f"{self.num_k_heads}"
            )
        check_kernel_size(self.kernel_size)
        self.check_decay()

    def forward_flops(self, settings: ModelSettings, sequence_length: int) -> float:
        """Floating-point operations of a forward pass, per token.

        Counted are the projections, the convolution, and the three products with the memory: what
        it holds at the key, what is written, what is read.

        Args:
            settings: The architecture.
            sequence_length: Tokens of a document; each costs the same.
        """
        keys, values = self.num_k_heads * self.k_head_dim, self.num_v_heads * self.v_head_dim
        convolved = 2 * keys + values
        gates = 2 * self.num_v_heads + (values if self.use_gate else 0)
        projections = 2 * settings.hidden_size * (convolved + gates + values)
        return float(projections + 2 * convolved * self.kernel_size + 6 * values * self.k_head_dim)

    def build(self, settings: ModelSettings, layer: int, kernels: KernelPolicy) -> "GatedDeltaNet":
        """Build the module of one layer.

        Args:
            settings: The architecture.
            layer: Index of the layer.
            kernels: Which implementations run.
        """
        return GatedDeltaNet(self, settings, kernels)


class GatedDeltaNet(RecurrentMixer):
    """Projections, convolution, gated delta rule, gated norm of each head, projection."""

    # The norm is of one head, with a weight that all heads share.
    shard_plan: ClassVar[Mapping[str, str] | None] = {
        "qkv": "column",
        "gates": "column",
        "convolution": "column",
        "decay_gate": "column",
        "output": "row",
    }

    def __init__(
        self, config: GatedDeltaNetConfig, settings: ModelSettings, kernels: KernelPolicy
    ) -> None:
        """Allocate without initialising.

        Args:
            config: What this layer is.
            settings: The architecture.
            kernels: Which implementations run.
        """
        super().__init__(kernels)
        H, N = settings.hidden_size, config.num_v_heads
        keys, values = config.num_k_heads * config.k_head_dim, N * config.v_head_dim
        std = linear_std(settings, H)
        self.config = config
        self.qkv_sizes = [keys, keys, values]
        # Rows of the second projection: steps of the decay, strengths of writing, gate.
        self.gate_sizes = [N, N, *([values] if config.use_gate else [])]
        self.shard_sections = {
            "qkv": self.qkv_sizes,
            "convolution": self.qkv_sizes,
            "gates": self.gate_sizes,
        }
        self.shard_units = head_units(
            {"num_v_heads": N, "num_k_heads": config.num_k_heads},
            {"num_k_heads": config.k_head_dim},
        )
        self.qkv = Linear(H, sum(self.qkv_sizes), bias=False, std=std, mup=False)
        self.gates = Linear(H, sum(self.gate_sizes), bias=False, std=std, mup=False)
        self.convolution = ShortConvolution(
            sum(self.qkv_sizes),
            config.kernel_size,
            bias=False,
            activation="silu",
            settings=settings,
            kernels=kernels,
        )
        self.decay_gate = DecayGate(N, config, mup=False)
        self.norm = GatedNorm(
            "rmsnorm",
            config.v_head_dim,
            norm_before_gate=config.norm_before_gate,
            settings=settings,
            kernels=kernels,
        )
        self.output = Linear(
            values, H, bias=False, std=linear_std(settings, values, output=True), mup=False
        )
        self.delta_rule = kernels.bind(GATED_DELTA_RULE)
        self.state_shape = (N, config.k_head_dim, config.v_head_dim)

    def forward(self, x: Tensor, context: SequenceContext, cache: LayerCache | None) -> Tensor:
        """Mix along the sequence; see `SequenceMixer`."""
        config = self.config
        sequences = self.sequences(x, context, cache)
        qkv = self.convolve(self.pack(self.qkv(x), sequences), sequences, cache)
        query, key, value = qkv.split(self.here(self.qkv_sizes), dim=-1)
        query, key = (
            self.heads_here(each, config.num_k_heads, serve=config.num_v_heads)
            for each in (query, key)
        )
        value = value.unflatten(-1, (-1, config.v_head_dim))
        gates = self.pack(self.gates(x), sequences)
        dt, strength, *gate = gates.split(self.here(self.gate_sizes), dim=-1)
        log_decay = self.decay_gate(dt)
        beta = torch.sigmoid(strength.to(log_decay.dtype))
        beta = 2.0 * beta if config.allow_neg_eigval else beta

        # Quoted: some versions of torch cannot trace the making of a union.
        def run(initial: "Tensor | None") -> tuple[Tensor, Tensor]:
            return self.delta_rule(
                query,
                key,
                value,
                log_decay,
                beta,
                scale=config.attention_multiplier,
                initial_state=initial,
                return_final_state=True,
                cu_seqlens=sequences.cu_seqlens,
                chunk_size=sequences.chunk_size(64),
            )

        y = self.recur(run, sequences, cache)
        opening = gate[0].unflatten(-1, (-1, config.v_head_dim)) if gate else None
        return self.output(self.unpack(self.norm(y, opening).flatten(-2), sequences))
