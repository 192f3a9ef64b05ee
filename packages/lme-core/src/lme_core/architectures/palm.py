"""The parallel decoder: x + mixer(norm(x)) + mlp(norm(x)), with one norm a layer."""

from dataclasses import dataclass
from typing import Literal

from lme_core.architectures.decoder import Decoder, MixerBlock
from lme_core.architectures.decoder_config import DecoderConfig
from lme_core.architectures.stream import Stream
from lme_core.layers.auxiliary import Auxiliary
from lme_core.layers.context import SequenceContext
from lme_core.layers.normalization import build_norm
from lme_core.mixers.base import LayerCache
from lme_kernels.policy import KernelPolicy


@dataclass(frozen=True, slots=True, kw_only=True)
class PaLMConfig(DecoderConfig):
    """Decoder whose sequence mixer and MLP read the same normalised stream."""

    model_type: Literal["palm"] = "palm"
    """Kind of architecture."""

    def build(self, kernels: KernelPolicy, *, seed: int = 42) -> Decoder:
        """Build the model; under `torch.device("meta")` without memory and values.

        Args:
            kernels: Which implementations run.
            seed: Seed of the initial values.
        """
        return Decoder(self, lambda layer: PaLMBlock(self, layer, kernels), kernels, seed)


class PaLMBlock(MixerBlock):
    """x + c * (mixer(norm(x)) + mlp(norm(x))) with c = `m_residual`.

    Source: Chowdhery et al. 2022, section 2 (arXiv:2204.02311).
    """

    def __init__(self, config: PaLMConfig, layer: int, kernels: KernelPolicy) -> None:
        """Allocate without initialising.

        Args:
            config: The architecture.
            layer: Index of the layer.
            kernels: Which implementations run.
        """
        super().__init__(config, layer, kernels)
        self.norm = build_norm(config, config.hidden_size, kernels)

    def forward(
        self, stream: Stream, context: SequenceContext, cache: LayerCache | None
    ) -> tuple[Stream, Auxiliary]:
        """Update the residual stream; see `Block`."""
        normalized = self.norm(stream.x)
        mixed = self.sequence_mixer(normalized, context, cache)
        y, auxiliary = self.mlp(normalized, context)
        return Stream(stream.x + self.scaled(mixed + y), stream.carried), auxiliary
