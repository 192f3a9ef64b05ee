"""No MLP: for blocks that are a sequence mixer alone."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lme_core.layers.auxiliary import Auxiliary, no_auxiliary
from lme_core.layers.context import SequenceContext
from lme_core.layers.settings import ModelSettings
from lme_core.mlps.base import MLP
from lme_kernels.policy import KernelPolicy


@dataclass(frozen=True, slots=True, kw_only=True)
class NoMLPConfig:
    """No MLP, and no norm before it: the block is its sequence mixer, as in Mamba 2."""

    mlp_type: Literal["none"]
    """Kind of MLP."""

    def has_dropout(self) -> bool:
        """Say whether anything is dropped in training: nothing."""
        return False

    def forward_flops(self, settings: ModelSettings, sequence_length: int) -> float:
        """Floating-point operations of a forward pass, per token: none."""
        return 0.0

    def inactive_parameters(self, settings: ModelSettings) -> int:
        """Parameters that a token does not use: none."""
        return 0

    def build(self, settings: ModelSettings, layer: int, kernels: KernelPolicy) -> MLP:
        """Build the module of one layer.

        Args:
            settings: The architecture.
            layer: Index of the layer.
            kernels: Which implementations run.
        """
        return NoMLP()


class NoMLP(MLP):
    """Adds nothing; blocks leave the call out."""

    shard_plan: ClassVar[Mapping[str, str] | None] = {}

    def forward(self, x: Tensor, context: SequenceContext) -> tuple[Tensor, Auxiliary]:
        """Give zeros; see `MLP`."""
        return torch.zeros_like(x), no_auxiliary()
