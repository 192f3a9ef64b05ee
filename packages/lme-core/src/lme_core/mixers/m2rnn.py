"""A recurrence whose state is a matrix a head, and not linear in it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from lme_core.layers import random
from lme_core.layers.context import SequenceContext
from lme_core.layers.initialization import Constant, ParameterSpec, linear_std
from lme_core.layers.linear import Linear
from lme_core.layers.settings import ModelSettings, Normalization
from lme_core.mixers.base import LayerCache
from lme_core.mixers.checks import check_positive, common_heads, head_units
from lme_core.mixers.decay_gate import DecayGate, DecayGateFields
from lme_core.mixers.gated_norm import GatedNorm
from lme_core.mixers.recurrent import RecurrentMixer, RecurrentMixerConfig
from lme_core.mixers.short_convolution import (
    ShortConvolution,
    check_kernel_size,
    check_plain_activation,
    plain_activation,
)
from lme_kernels.ops.m2rnn import M2RNN as M2RNN_OP
from lme_kernels.policy import KernelPolicy


@dataclass(frozen=True, slots=True, kw_only=True)
class M2RNNConfig(RecurrentMixerConfig, DecayGateFields):
    """H_t = f_t H_{t-1} + (1 - f_t) tanh(H_{t-1} W + k_t^T v_t), read as q_t H_t, in every head."""

    sequence_mixer_type: Literal["m2rnn"] = "m2rnn"
    """Kind of mixer."""
    k_head_dim: int
    """Channels of a query or key: rows of a state."""
    v_head_dim: int
    """Channels of a value: columns of a state."""
    num_q_heads: int
    """Heads of queries. The largest number of heads is that of the recurrence; each head of fewer
    serves as many neighbours."""
    num_k_heads: int
    """Heads of keys."""
    num_v_heads: int
    """Heads of values."""
    num_f_heads: int
    """Heads of what a token says on forgetting; how fast each head of the recurrence forgets is
    its own."""
    num_g_heads: int
    """Heads of the gate, whose silu multiplies the output."""
    num_weight_heads: int
    """Heads of the matrices W."""
    use_residual: bool
    """Whether the values, each times a learned factor, are added to what is read."""
    kernel_size: int | None = None
    """Tokens that a convolution of queries, keys and values sees, at least 2; null for none."""
    activation_function: str | None = None
    """Function of queries, keys and values, after the convolution if there is one; null for
    none."""
    add_bias: bool = False
    """Whether the input projection and the convolution have biases."""
    gradient_clipping: float | None = None
    """Bound on each element of a state's gradient, backward in time; null for none."""
    normalization_function: Normalization | None = None
    """Norm of the gated output; null for none."""

    def __post_init__(self) -> None:
        check_positive(
            {
                "k_head_dim": self.k_head_dim,
                "v_head_dim": self.v_head_dim,
                "gradient_clipping": self.gradient_clipping,
            }
        )
        self.num_heads()
        check_kernel_size(self.kernel_size)
        check_plain_activation(self.activation_function)
        self.check_decay()

    def num_heads(self) -> int:
        """Heads of the recurrence.

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
            "num_f_heads": self.num_f_heads,
            "num_g_heads": self.num_g_heads,
            "num_weight_heads": self.num_weight_heads,
        }

    def sizes(self) -> list[int]:
        """Widths of queries, keys, values, forgetting and gates."""
        return [
            self.num_q_heads * self.k_head_dim,
            self.num_k_heads * self.k_head_dim,
            self.num_v_heads * self.v_head_dim,
            self.num_f_heads,
            self.num_g_heads * self.v_head_dim,
        ]

    def forward_flops(self, settings: ModelSettings, sequence_length: int) -> float:
        """Floating-point operations of a forward pass, per token.

        Counted are the projections, the convolution, and the state's products with W, with the
        query, and of key and value.

        Args:
            settings: The architecture.
            sequence_length: Tokens of a document; each costs the same.
        """
        width, sizes = self.num_heads() * self.v_head_dim, self.sizes()
        projections = 2 * settings.hidden_size * (sum(sizes) + width)
        convolution = 2 * sum(sizes[:3]) * (self.kernel_size or 0)
        return float(
            projections + convolution + 2 * width * self.k_head_dim * (self.v_head_dim + 2)
        )

    def build(self, settings: ModelSettings, layer: int, kernels: KernelPolicy) -> "M2RNN":
        """Build the module of one layer.

        Args:
            settings: The architecture.
            layer: Index of the layer.
            kernels: Which implementations run.
        """
        return M2RNN(self, settings, kernels)


@dataclass(frozen=True, slots=True)
class Identities:
    """The identity in every head's matrix."""

    def __call__(
        self, key: int, shape: Sequence[int], region: Sequence[slice] | None = None
    ) -> Tensor:
        """Compute a region; see `Initializer`."""
        heads, rows, columns = (
            torch.arange(first, last) for first, last in random.region_bounds(shape, region)
        )
        return (rows[:, None] == columns).float().expand(len(heads), -1, -1).clone()


class M2RNN(RecurrentMixer):
    """Projection, convolution, recurrence of matrices, gated norm, projection."""

    shard_plan: ClassVar[Mapping[str, str] | None] = {
        "input": "column",
        "convolution": "column",
        "decay_gate": "column",
        "state_weight": "heads",
        "D": "column",
        "norm": "column",
        "output": "row",
    }

    def __init__(self, config: M2RNNConfig, settings: ModelSettings, kernels: KernelPolicy) -> None:
        """Allocate without initialising.

        Args:
            config: What this layer is.
            settings: The architecture.
            kernels: Which implementations run.
        """
        super().__init__(kernels)
        H, N, V, sizes = settings.hidden_size, config.num_heads(), config.v_head_dim, config.sizes()
        width = N * V
        self.config = config
        # Rows of the projection: queries, keys, values, forgetting, gates.
        self.qkv_sizes = sizes[:3]
        self.sizes = [sum(sizes[:3]), *sizes[3:]]
        self.num_heads = N
        self.shard_sections = {"input": sizes, "convolution": self.qkv_sizes}
        names = ("num_q_heads", "num_k_heads", "num_v_heads", "num_f_heads", "num_g_heads")
        widths = (config.k_head_dim, config.k_head_dim, V, 1, V)
        self.shard_units = head_units(config.head_counts(), dict(zip(names, widths, strict=True)))
        self.input = Linear(
            H, sum(sizes), bias=config.add_bias, std=linear_std(settings, H), mup=True
        )
        self.activation = None
        if config.kernel_size is None:
            self.activation = plain_activation(config.activation_function, kernels)
        else:
            self.convolution = ShortConvolution(
                self.sizes[0],
                config.kernel_size,
                bias=config.add_bias,
                activation=config.activation_function,
                settings=settings,
                kernels=kernels,
            )
        self.decay_gate = DecayGate(N, config, mup=True)
        self.state_weight = nn.Parameter(torch.empty(config.num_weight_heads, V, V))
        self.D = nn.Parameter(torch.empty(N, V)) if config.use_residual else None
        self.norm = GatedNorm(
            config.normalization_function, width, settings=settings, kernels=kernels
        )
        self.output = Linear(
            width, H, bias=False, std=linear_std(settings, width, output=True), mup=True
        )
        self.m2rnn = kernels.bind(M2RNN_OP)
        self.state_shape = (N, config.k_head_dim, V)

    def parameter_specs(self) -> Mapping[str, ParameterSpec]:
        """Specs of `state_weight` and, where there is one, `D`, the factors of the values."""
        specs = {"state_weight": ParameterSpec(Identities(), weight_decay=False, mup=True)}
        if self.D is not None:
            specs["D"] = ParameterSpec(Constant(1.0), weight_decay=False)
        return specs

    def forward(self, x: Tensor, context: SequenceContext, cache: LayerCache | None) -> Tensor:
        """Mix along the sequence; see `SequenceMixer`."""
        config, N = self.config, self.num_heads
        (here,) = self.here([N])
        sequences = self.sequences(x, context, cache)
        tokens = self.pack(self.input(x), sequences)
        qkv, forget, gate = tokens.split(self.here(self.sizes), dim=-1)
        qkv = self.convolve(qkv, sequences, cache)
        if self.activation is not None:
            qkv = self.activation(qkv)
        query, key, value = qkv.split(self.here(self.qkv_sizes), dim=-1)
        query = self.heads_here(query, config.num_q_heads, serve=N)
        key = self.heads_here(key, config.num_k_heads, serve=N)
        value = self.heads_here(value, config.num_v_heads, serve=N)
        forget = self.heads_here(forget, config.num_f_heads, serve=N).flatten(-2)
        forget = _spread(forget, here, dim=-1)
        weight = self.state_weight
        if len(weight) == config.num_weight_heads:
            weight = self.select_heads(weight, serve=N, dim=0)
        kept = self.decay_gate(forget).exp().to(query.dtype)

        # Quoted: some versions of torch cannot trace the making of a union.
        def run(initial: "Tensor | None") -> tuple[Tensor, Tensor]:
            return self.m2rnn(
                query,
                key,
                value,
                weight,
                kept,
                initial_state=initial,
                cu_seqlens=sequences.cu_seqlens,
                max_seqlen=sequences.max_seqlen(),
                gradient_clipping=config.gradient_clipping,
            )

        y = self.recur(run, sequences, cache)
        if self.D is not None:
            y = y + self.D * _spread(value, here, dim=-2)
        gates = self.heads_here(gate, config.num_g_heads, serve=N)
        gates = _spread(gates, here, dim=-2)
        y = self.norm(y.flatten(-2), gates.flatten(-2))
        return self.output(self.unpack(y, sequences))


def _spread(x: Tensor, heads: int, *, dim: int) -> Tensor:
    """Repeat each head for as many neighbours as it serves, up to `heads`."""
    return x.repeat_interleave(heads // x.shape[dim], dim=dim)
