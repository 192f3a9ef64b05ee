"""The plain decoder: x + mixer(norm(x)), then x + mlp(norm(x)), or with norms elsewhere."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from lme_core.architectures.decoder import Decoder, MixerBlock
from lme_core.architectures.decoder_config import DecoderConfig
from lme_core.architectures.stream import Stream
from lme_core.layers.auxiliary import Auxiliary, no_auxiliary
from lme_core.layers.context import SequenceContext
from lme_core.layers.normalization import Norm, build_norm
from lme_core.mixers.base import LayerCache
from lme_core.mlps.none import NoMLPConfig
from lme_kernels.policy import KernelPolicy

NormPlacement = Literal["pre", "post", "sandwich"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GPTBaseConfig(DecoderConfig):
    """Decoder with any mix of sequence mixers and MLPs, one after the other."""

    model_type: Literal["gpt_base"] = "gpt_base"
    """Kind of architecture."""
    norm_placement: NormPlacement = "pre"
    """Where a block normalises: before mixer and MLP; after them, before their output is added to
    the residual stream, as in OLMo 2; or both, as in Gemma 2."""
    may_lack_mlps: ClassVar[bool] = True

    def build(self, kernels: KernelPolicy, *, seed: int = 42) -> Decoder:
        """Build the model; under `torch.device("meta")` without memory and values.

        Args:
            kernels: Which implementations run.
            seed: Seed of the initial values.
        """
        return Decoder(
            self,
            lambda layer: GPTBaseBlock(self, layer, kernels, self.norm_placement),
            kernels,
            seed,
        )


class GPTBaseBlock(MixerBlock):
    """x + mixer(norm(x)), then x + mlp(norm(x)), each addition times `m_residual`.

    `norm_placement` may move the norms: x + norm(mixer(x)), or x + norm(mixer(norm(x))).
    """

    def __init__(
        self,
        config: DecoderConfig,
        layer: int,
        kernels: KernelPolicy,
        placement: NormPlacement = "pre",
    ) -> None:
        """Allocate without initialising.

        Args:
            config: The architecture.
            layer: Index of the layer.
            kernels: Which implementations run.
            placement: Where there are norms.
        """
        super().__init__(config, layer, kernels)
        has_mlp = not isinstance(config.mlps()[layer], NoMLPConfig)
        before, after = placement != "post", placement != "pre"

        def norm(is_there: bool) -> Norm | None:
            return build_norm(config, config.hidden_size, kernels) if is_there else None

        self.has_mlp = has_mlp
        self.mixer_norm = norm(before)
        self.mixer_output_norm = norm(after)
        self.mlp_norm = norm(before and has_mlp)
        self.mlp_output_norm = norm(after and has_mlp)

    def forward(
        self, stream: Stream, context: SequenceContext, cache: LayerCache | None
    ) -> tuple[Stream, Auxiliary]:
        """Update the residual stream; see `Block`."""
        mixed = self.sequence_mixer(_normed(self.mixer_norm, stream.x), context, cache)
        mixed = _normed(self.mixer_output_norm, mixed)
        if not self.has_mlp:
            return Stream(stream.x + self.scaled(mixed), stream.carried), no_auxiliary()
        if self.mlp_norm is None:
            x = stream.x + self.scaled(mixed)
            y, auxiliary = self.mlp(x, context)
        else:
            normalized, x = self.mlp_norm(mixed, stream.x, self.residual_scale)
            y, auxiliary = self.mlp(normalized, context)
        y = _normed(self.mlp_output_norm, y)
        return Stream(x + self.scaled(y), stream.carried), auxiliary


def _normed(norm: Norm | None, x: Tensor) -> Tensor:
    return x if norm is None else norm(x)
