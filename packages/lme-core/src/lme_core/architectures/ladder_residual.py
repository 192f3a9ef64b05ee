"""The ladder decoder: each part reads the stream without the output of the part before it."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from lme_core.architectures.decoder import Decoder, MixerBlock
from lme_core.architectures.decoder_config import DecoderConfig
from lme_core.architectures.stream import Stream
from lme_core.layers.auxiliary import Auxiliary
from lme_core.layers.context import SequenceContext
from lme_core.layers.normalization import build_norm
from lme_core.mixers.base import LayerCache
from lme_kernels.policy import KernelPolicy


@dataclass(frozen=True, slots=True, kw_only=True)
class LadderResidualConfig(DecoderConfig):
    """Decoder whose sequence mixers and MLPs are added to the stream one part later.

    So the communication of one can overlap the computation of the next.
    """

    model_type: Literal["ladder_residual"] = "ladder_residual"
    """Kind of architecture."""

    def build(self, kernels: KernelPolicy, *, seed: int = 42) -> Decoder:
        """Build the model; under `torch.device("meta")` without memory and values.

        Args:
            kernels: Which implementations run.
            seed: Seed of the initial values.
        """
        return LadderDecoder(
            self, lambda layer: LadderResidualBlock(self, layer, kernels), kernels, seed
        )


class LadderDecoder(Decoder):
    """Decoder whose stream carries the last mixer's and the last MLP's output, not added yet."""

    def residual(self, stream: Stream) -> Tensor:
        """Return the residual stream with all that blocks have added to it; see `Decoder`."""
        scale, x = self.config.m_residual, stream.x
        for each in stream.carried:
            x = x + (each if scale is None else scale * each)
        return x


class LadderResidualBlock(MixerBlock):
    """Adds the outputs of the block before, each just before the part that must not miss it.

    With c = `m_residual`: x <- x + c * a; a' = mixer(norm(x)); x <- x + c * m; m' = mlp(norm(x)),
    where a and m come from the block before, and a' and m' go to the next.

    Source: Zhang et al. 2025, section 3 (arXiv:2501.06589).
    """

    def __init__(self, config: LadderResidualConfig, layer: int, kernels: KernelPolicy) -> None:
        """Allocate without initialising.

        Args:
            config: The architecture.
            layer: Index of the layer.
            kernels: Which implementations run.
        """
        super().__init__(config, layer, kernels)
        self.mixer_norm = build_norm(config, config.hidden_size, kernels)
        self.mlp_norm = build_norm(config, config.hidden_size, kernels)

    def forward(
        self, stream: Stream, context: SequenceContext, cache: LayerCache | None
    ) -> tuple[Stream, Auxiliary]:
        """Update the residual stream; see `Block`."""
        x, scale = stream.x, self.residual_scale
        if stream.carried:
            mixed_before, transformed_before = stream.carried
            normalized, x = self.mixer_norm(mixed_before, x, scale)
            mixed = self.sequence_mixer(normalized, context, cache)
            normalized, x = self.mlp_norm(transformed_before, x, scale)
        else:
            mixed = self.sequence_mixer(self.mixer_norm(x), context, cache)
            normalized = self.mlp_norm(x)
        transformed, auxiliary = self.mlp(normalized, context)
        return Stream(x, (mixed, transformed)), auxiliary
