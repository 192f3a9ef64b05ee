"""Mixture of experts: a router, the experts it chooses, and shared ones that serve every token."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from lme_core.layers.activation import check_activation, is_glu
from lme_core.layers.auxiliary import Auxiliary, no_auxiliary
from lme_core.layers.context import SequenceContext
from lme_core.layers.dropout import check_probability, dropout
from lme_core.layers.initialization import linear_std
from lme_core.layers.linear import Linear
from lme_core.layers.settings import ModelSettings
from lme_core.mlps.base import MLP
from lme_core.mlps.dense import DenseMLPConfig
from lme_core.mlps.experts import Experts
from lme_core.mlps.routing import Balancer, Router, Score
from lme_kernels.policy import KernelPolicy

logger = logging.getLogger(__name__)

_OUTPUT_DROPOUT = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class MoEConfig:
    """Mixture of experts."""

    mlp_type: Literal["MoE"] = "MoE"
    """Kind of MLP."""
    intermediate_size: int | None = None
    """Width of each expert between its two layers; absent: 4 times `hidden_size`."""
    activation_function: str = "gelu_pytorch_tanh"
    """Name of the activation; one that ends in `glu` is gated and doubles the first layer."""
    dropout: float = 0.0
    """Probability of dropping a channel of the output."""
    add_bias: bool = False
    """Whether the linear layers of the experts have biases."""
    num_experts: int = 8
    """Experts that the router chooses among."""
    num_experts_per_tok: int = 2
    """Experts that each token goes to."""
    normalized_topk: bool = True
    """Whether the weights of a token's experts add up to one."""
    shared_intermediate_size: int | None = None
    """Width of the expert that serves every token; absent: there is none."""
    shared_expert_gating: bool = False
    """Whether the shared expert is multiplied by the sigmoid of a projection of the token."""
    router_score_function: Score = "softmax"
    """What a router's logit becomes: its share among all experts, or its sigmoid."""
    routed_scaling_factor: float = 1.0
    """Factor of the weights of a token's experts."""
    num_expert_groups: int | None = None
    """Groups that the experts form in order; absent: they form none."""
    num_groups_per_tok: int | None = None
    """Groups that a token's experts may come from; given with `num_expert_groups`."""
    expert_bias_update_rate: float | None = None
    """Step by which a bias for choosing each expert follows its load, once an optimizer step: it
    balances without a loss. 0 keeps the biases as they are; absent: there are none."""
    use_interleaved_weights: bool | None = None
    """Accepted for old files; without effect: gate and up rows always alternate."""

    def __post_init__(self) -> None:
        for name, value in (
            ("intermediate_size", self.intermediate_size),
            ("num_experts", self.num_experts),
            ("shared_intermediate_size", self.shared_intermediate_size),
        ):
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}")
        if not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ValueError(
                f"`num_experts_per_tok` must be at least 1 and at most `num_experts` "
                f"({self.num_experts}), got {self.num_experts_per_tok}"
            )
        if self.shared_expert_gating and self.shared_intermediate_size is None:
            raise ValueError(
                "`shared_expert_gating: true` needs a shared expert: set "
                "`shared_intermediate_size`, or leave it out"
            )
        if self.routed_scaling_factor <= 0:
            raise ValueError(
                f"`routed_scaling_factor` must be above 0, got {self.routed_scaling_factor}"
            )
        if self.expert_bias_update_rate is not None and self.expert_bias_update_rate < 0:
            raise ValueError(
                "`expert_bias_update_rate` must be at least 0, or absent for no biases; got "
                f"{self.expert_bias_update_rate}"
            )
        if self.use_interleaved_weights is not None:
            logger.warning(
                "setting without effect: use_interleaved_weights=%s", self.use_interleaved_weights
            )
        self._check_groups()
        check_activation(self.activation_function)
        check_probability("dropout", self.dropout)

    def has_dropout(self) -> bool:
        """Say whether anything is dropped in training."""
        return self.dropout > 0

    def width(self, hidden_size: int) -> int:
        """Width of each expert in a model of that width."""
        return 4 * hidden_size if self.intermediate_size is None else self.intermediate_size

    def forward_flops(self, settings: ModelSettings, sequence_length: int) -> float:
        """Floating-point operations of a forward pass, per token, of the matrix products.

        Counted are the router, the chosen experts and the shared one with its gate.
        """
        H, layers = settings.hidden_size, 3 if is_glu(self.activation_function) else 2
        experts = self.num_experts_per_tok * self.width(H) + (self.shared_intermediate_size or 0)
        gates = self.num_experts + (1 if self.shared_expert_gating else 0)
        return 2.0 * H * (experts * layers + gates)

    def inactive_parameters(self, settings: ModelSettings) -> int:
        """Parameters that a token does not use: those of the experts it is not sent to."""
        H, width = settings.hidden_size, self.width(settings.hidden_size)
        rows = width * (2 if is_glu(self.activation_function) else 1)
        biases = rows + H if self.add_bias else 0
        expert = rows * H + H * width + biases
        return (self.num_experts - self.num_experts_per_tok) * expert

    def build(self, settings: ModelSettings, layer: int, kernels: KernelPolicy) -> "MoE":
        """Build the module of one layer.

        Args:
            settings: The architecture.
            layer: Index of the layer.
            kernels: Which implementations run.
        """
        return MoE(self, settings, layer, kernels)

    def _check_groups(self) -> None:
        groups, kept = self.num_expert_groups, self.num_groups_per_tok
        if (groups is None) != (kept is None):
            raise ValueError(
                "`num_expert_groups` and `num_groups_per_tok` must be given together, got "
                f"{groups} and {kept}"
            )
        if groups is None or kept is None:
            return
        if groups < 1 or self.num_experts % groups:
            raise ValueError(
                f"`num_expert_groups` must divide `num_experts` ({self.num_experts}), got {groups}"
            )
        if not 1 <= kept <= groups:
            raise ValueError(
                f"`num_groups_per_tok` must be at least 1 and at most `num_expert_groups` "
                f"({groups}), got {kept}"
            )
        if self.num_experts_per_tok > kept * (self.num_experts // groups):
            raise ValueError(
                f"`num_experts_per_tok` ({self.num_experts_per_tok}) must be at most the "
                f"{kept * (self.num_experts // groups)} experts of `num_groups_per_tok` ({kept}) "
                "groups"
            )


class Dispatched(NamedTuple):
    """Tokens where their experts are."""

    x: Tensor
    """Shape (T', H)."""
    weights: Tensor
    """Weight of each choice, shape (T', k')."""
    indices: Tensor
    """Number of the chosen expert among those that are here, shape (T', k')."""
    receipt: Any
    """What `combine` needs to bring results back; its kind is the business of who dispatched."""


class MoE(MLP):
    """Routed experts, and a shared one beside them."""

    shard_plan: ClassVar[Mapping[str, str] | None] = {}

    dispatch: Callable[[Tensor, Tensor, Tensor], Dispatched]
    """Sends tokens (T, H) with weights and indices (T, k) to where their experts are. Public so that
    experts spread over devices can be served by another function; so is `combine`."""
    combine: Callable[[Tensor, Any], Tensor]
    """Brings the outputs (T', H) of dispatched tokens back and adds those of one token: (T, H)."""

    def __init__(
        self, config: MoEConfig, settings: ModelSettings, layer: int, kernels: KernelPolicy
    ) -> None:
        """Allocate without initialising.

        Args:
            config: What this layer's experts are.
            settings: The architecture.
            layer: Index of the layer.
            kernels: Which implementations run.
        """
        super().__init__()
        H, width = settings.hidden_size, config.width(settings.hidden_size)
        self.config = config
        groups = None
        if config.num_expert_groups is not None and config.num_groups_per_tok is not None:
            groups = (config.num_expert_groups, config.num_groups_per_tok)
        self.router = Router(
            H,
            config.num_experts,
            config.num_experts_per_tok,
            score=config.router_score_function,
            normalize=config.normalized_topk,
            scale=config.routed_scaling_factor,
            groups=groups,
            with_bias=config.expert_bias_update_rate is not None,
            std=linear_std(settings, H),
            kernels=kernels,
        )
        self.balancer = Balancer(config.router_score_function, kernels)
        self.experts = Experts(
            config.num_experts,
            H,
            width,
            activation=config.activation_function,
            bias=config.add_bias,
            up_std=linear_std(settings, H),
            down_std=linear_std(settings, width, output=True),
            kernels=kernels,
        )
        self.shared: MLP | None = None
        self.shared_gate: Linear | None = None
        if config.shared_intermediate_size is not None:
            shared = DenseMLPConfig(
                intermediate_size=config.shared_intermediate_size,
                activation_function=config.activation_function,
                add_bias=config.add_bias,
            )
            self.shared = shared.build(settings, layer, kernels)
        if config.shared_expert_gating:
            self.shared_gate = Linear(H, 1, bias=False, std=linear_std(settings, H), mup=False)
        self.dispatch = _stay
        self.combine = _as_they_are

    def forward(self, x: Tensor, context: SequenceContext) -> tuple[Tensor, Auxiliary]:
        """Send each token through its experts; see `MLP`.

        In training the auxiliary results are the losses `router_aux_loss` and `router_z_loss` and
        the statistics `expert_counts` (E,), `router_entropy` and `router_tokens`.
        """
        routing = self.router(x)
        sent = self.dispatch(
            x.flatten(0, 1), routing.weights.flatten(0, 1), routing.indices.flatten(0, 1)
        )
        y = self.combine(self.experts(sent.x, sent.weights, sent.indices), sent.receipt)
        y = y.view_as(x)
        if self.shared is not None:
            shared, _ = self.shared(x, context)
            if self.shared_gate is not None:
                shared = torch.sigmoid(self.shared_gate(x)) * shared
            y = y + shared
        if context.dropout_key is not None and context.token_index is not None:
            y = dropout(
                y, self.config.dropout, context.dropout_key, _OUTPUT_DROPOUT, context.token_index
            )
        if not self.training:
            return y, no_auxiliary()
        balance = self.balancer(routing, context.valid)
        return y, Auxiliary(
            losses={"router_aux_loss": balance.aux_loss, "router_z_loss": balance.z_loss},
            statistics={
                "expert_counts": balance.counts,
                "router_entropy": balance.entropy,
                "router_tokens": balance.tokens,
            },
        )


def _stay(x: Tensor, weights: Tensor, indices: Tensor) -> Dispatched:
    return Dispatched(x, weights, indices, None)


def _as_they_are(y: Tensor, receipt: None) -> Tensor:
    return y
