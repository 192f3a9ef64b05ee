"""The pre-norm decoder: x + mixer(norm(x)), then x + mlp(norm(x))."""

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
class GPTBaseConfig(DecoderConfig):
    """Pre-norm decoder with any mix of sequence mixers and MLPs."""

    model_type: Literal["gpt_base"] = "gpt_base"
    """Kind of architecture."""

    def build(self, kernels: KernelPolicy, *, seed: int = 42) -> Decoder:
        """Build the model; under `torch.device("meta")` without memory and values.

        Args:
            kernels: Which implementations run.
            seed: Seed of the initial values.
        """
        return Decoder(self, lambda layer: GPTBaseBlock(self, layer, kernels), kernels, seed)


class GPTBaseBlock(MixerBlock):
    """x + mixer(norm(x)), then x + mlp(norm(x)), each addition times `m_residual`."""

    def __init__(self, config: DecoderConfig, layer: int, kernels: KernelPolicy) -> None:
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
        mixed = self.sequence_mixer(self.mixer_norm(stream.x), context, cache)
        normalized, x = self.mlp_norm(mixed, stream.x, self.residual_scale)
        y, auxiliary = self.mlp(normalized, context)
        return Stream(x + self.scaled(y), stream.carried), auxiliary
