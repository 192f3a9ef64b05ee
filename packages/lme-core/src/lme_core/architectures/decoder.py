"""A decoder: embedding, blocks by layer, norm, head; whole or a slice of it."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lme_core.architectures.cache import DecoderCache
from lme_core.architectures.decoder_config import DecoderConfig
from lme_core.architectures.stream import Stream
from lme_core.layers import random
from lme_core.layers.auxiliary import Auxiliary, add_layer, no_auxiliary
from lme_core.layers.context import SequenceContext
from lme_core.layers.dropout import dropout
from lme_core.layers.initialization import (
    ParameterSpec,
    ParameterTraits,
    collect_buffer_specs,
    collect_specs,
)
from lme_core.layers.linear import Embedding, Linear
from lme_core.layers.normalization import build_norm
from lme_core.layers.rotary import Rotary
from lme_core.mixers.base import LayerCache, SequenceMixer
from lme_core.mlps.base import MLP
from lme_kernels.ops.fused_linear_cross_entropy import FUSED_LINEAR_CROSS_ENTROPY
from lme_kernels.policy import KernelPolicy

Batch = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class HeadOutput:
    """What the head makes of the last hidden states."""

    logits: Tensor | None
    """Shape (B, S, V)."""
    nll_sum: Tensor | None
    """Sum of the negative log-likelihoods of the labels that are not -100, in nats; 0-d."""


@dataclass(frozen=True, slots=True)
class DecoderOutputs:
    """What a forward pass gives."""

    logits: Tensor | None
    """Shape (B, S, V); `None` if they were not asked for."""
    nll_sum: Tensor | None
    """Summed negative log-likelihood in nats, 0-d; `None` if logits were asked for."""
    auxiliary: Mapping[str, Tensor]
    """Further losses by name, 0-d each, and statistics by name and layer (`name.layer`), which
    have no gradient: sums over the batch's sequences."""


class Block(nn.Module):
    """One layer; what it adds to the residual stream is its architecture's business."""

    def forward(
        self, stream: Stream, context: SequenceContext, cache: LayerCache | None
    ) -> tuple[Stream, Auxiliary]:
        """Update the residual stream.

        Args:
            stream: From the block before, or the embedding.
            context: Facts about the batch, at this layer.
            cache: This layer's, in generation.

        Returns:
            The stream for the next block, and this block's further losses and statistics by names
            that hold for every layer.
        """
        raise NotImplementedError

    def new_cache(
        self, batch_size: int, max_length: int, *, device: torch.device, dtype: torch.dtype
    ) -> LayerCache:
        """Make an empty cache of the layer's sequence mixer; see `SequenceMixer`."""
        raise NotImplementedError


class MixerBlock(Block):
    """A layer of one sequence mixer and one MLP, each of any kind."""

    def __init__(self, config: DecoderConfig, layer: int, kernels: KernelPolicy) -> None:
        """Build both, without initialising.

        Args:
            config: The architecture.
            layer: Index of the layer.
            kernels: Which implementations run.
        """
        super().__init__()
        self.residual_scale = 1.0 if config.m_residual is None else config.m_residual
        self.sequence_mixer: SequenceMixer = config.mixers()[layer].build(config, layer, kernels)
        self.mlp: MLP = config.mlps()[layer].build(config, layer, kernels)

    def new_cache(
        self, batch_size: int, max_length: int, *, device: torch.device, dtype: torch.dtype
    ) -> LayerCache:
        """Make an empty cache; see `SequenceMixer`."""
        return self.sequence_mixer.new_cache(batch_size, max_length, device=device, dtype=dtype)

    def scaled(self, y: Tensor) -> Tensor:
        """Return `y` times `m_residual`."""
        return y if self.residual_scale == 1.0 else self.residual_scale * y


class Decoder(nn.Module):
    """Embedding, blocks keyed by layer, final norm and head.

    A pipeline stage is a copy of which some blocks, and the modules that `part_ends` names at the
    end or ends it has not, were taken away: `forward_part` touches only what it needs.
    """

    linear_nll: Callable[..., Tensor]
    """The op (x (T, H), weight (V, H), labels (T,), *, logit_scale, softcap, reduction) -> loss.
    Public so that a vocabulary cut over devices can be served by another function."""
    linear_logits: Callable[[Tensor, Tensor], Tensor]
    """The product (x (..., H), weight (V, H)) -> logits; public for the same reason."""

    shard_plan: ClassVar[Mapping[str, str] | None] = {"embedding": "vocab", "lm_head": "vocab"}
    """How parameters may be cut; "vocab" is by rows, so by tokens of the vocabulary."""

    def __init__(
        self,
        config: DecoderConfig,
        build_block: Callable[[int], Block],
        kernels: KernelPolicy,
        seed: int,
    ) -> None:
        """Allocate; fill in initial values unless on the meta device.

        Args:
            config: The architecture.
            build_block: Makes the block of a layer.
            kernels: Which implementations run.
            seed: Seed of the initial values.
        """
        super().__init__()
        H, V = config.hidden_size, config.vocab_size
        self.config = config
        self.seed = seed
        fan_in = config.embedding_init_method == "fan_in"
        self.embedding = Embedding(
            V, H, std=1 / math.sqrt(H) if fan_in else config.initializer_range
        )
        self.position_embedding: Embedding | None = None
        if config.position_embedding_type == "learned_absolute":
            self.position_embedding = Embedding(
                config.max_position_embeddings, H, std=config.initializer_range
            )
        self.blocks = nn.ModuleDict({str(i): build_block(i) for i in range(config.num_layers)})
        self.final_norm = build_norm(config, H, kernels)
        self.lm_head: Linear | None = None
        if not config.tie_word_embeddings:
            self.lm_head = Linear(H, V, bias=False, std=config.initializer_range, mup=False)
        self.linear_nll = kernels.bind(FUSED_LINEAR_CROSS_ENTROPY)
        self.linear_logits = F.linear
        self.rotary = config.rotary()
        self.rotary_of_layers = config.rotary_of_layers()
        self.has_dropout = config.has_dropout()
        self.specs: Mapping[str, ParameterSpec] = collect_specs(self)
        self.specs_of_buffers: Mapping[str, ParameterSpec] = collect_buffer_specs(self)
        tensors = (*self.named_parameters(), *self.named_buffers())
        self.shapes = {name: tuple(each.shape) for name, each in tensors}
        if not any(p.is_meta for p in self.parameters()):
            self.initialize()

    def forward(
        self, batch: Batch, *, cache: DecoderCache | None = None, logits: bool = True
    ) -> DecoderOutputs:
        """Run the whole model.

        Args:
            batch: `input_ids` (B, S), and what `context` reads; `labels` for the loss.
            cache: Filled and read in generation.
            logits: Whether to give logits; otherwise the summed loss of `labels`, without them.

        Returns:
            Logits or summed loss, and auxiliary losses.
        """
        if cache is not None:
            batch = cache.place(batch)
        stream = self.embed(batch)
        stream, auxiliary = self.run_blocks(stream, self.context(batch, cache), cache)
        head = self.head(stream, None if logits else batch["labels"])
        further = {**auxiliary.losses, **auxiliary.statistics}
        return DecoderOutputs(head.logits, head.nll_sum, further)

    def forward_part(
        self,
        batch: Batch,
        tensors: tuple[Tensor, ...] | None,
        layers: Sequence[int],
        *,
        is_last: bool,
        logits: bool = True,
    ) -> tuple[tuple[Tensor, ...], DecoderOutputs]:
        """Run some of the layers: a pipeline stage.

        Args:
            batch: As of `forward`, in every stage.
            tensors: The stream from the stage before, `x` and what it carries; `None` for the
                first stage, which looks tokens up.
            layers: Which, in order.
            is_last: Whether the head comes after them.
            logits: As of `forward`; only the loss can be had.

        Returns:
            The stream for the next stage, nothing after the last; the loss, 0 before the last
            stage, and further losses and statistics of these layers.

        Raises:
            ValueError: If logits are asked for.
        """
        if logits:
            raise ValueError("stages of a pipeline give losses, not logits: pass `logits=False`")
        stream = self.embed(batch) if tensors is None else Stream(tensors[0], tuple(tensors[1:]))
        stream, auxiliary = self.run_blocks(stream, self.context(batch), layers=layers)
        further = {**auxiliary.losses, **auxiliary.statistics}
        if is_last:
            return (), DecoderOutputs(None, self.head(stream, batch["labels"]).nll_sum, further)
        dtype = torch.promote_types(stream.x.dtype, torch.float32)
        nothing = stream.x.new_zeros((), dtype=dtype)
        return (stream.x, *stream.carried), DecoderOutputs(None, nothing, further)

    def part_ends(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Name the modules that only the first, and that only the last pipeline stage needs."""
        head = "embedding" if self.lm_head is None else "lm_head"
        return ("embedding", "position_embedding"), ("final_norm", head)

    def part_costs(self) -> tuple[float, tuple[float, ...], float]:
        """Work of the embedding, of each block and of the head, by which stages are cut.

        Returns:
            Floating-point operations of a forward pass per token, of short sequences.
        """
        config = self.config
        blocks = tuple(
            mixer.forward_flops(config, 1) + mlp.forward_flops(config, 1)
            for mixer, mlp in zip(config.mixers(), config.mlps(), strict=True)
        )
        # Looking up copies one row.
        return config.hidden_size, blocks, 2.0 * config.hidden_size * config.vocab_size

    def embed(self, batch: Batch) -> Stream:
        """Look up tokens and, where they are learned, positions.

        Args:
            batch: `input_ids` (B, S), `position_ids` where positions are not 0 to S - 1,
                `dropout_key` and `token_index` in training with dropout.

        Returns:
            The residual stream, nothing carried.
        """
        ids = batch["input_ids"]
        x = self.embedding(ids)
        if self.position_embedding is not None:
            x = x + self._learned_positions(batch, ids.shape[1])
        key, index = batch.get("dropout_key"), batch.get("token_index")
        if key is not None and index is not None:
            x = dropout(x, self.config.embedding_dropout, key, 0, index)
        return Stream(x if self.config.m_emb is None else x * self.config.m_emb)

    def context(self, batch: Batch, cache: DecoderCache | None = None) -> SequenceContext:
        """Compute what all blocks share.

        Args:
            batch: `input_ids`, and where they apply `position_ids`, `cu_seqlens`, `valid`,
                `dropout_key`, `token_index`. Without a cache padding is on the right, where
                causality hides it.
            cache: In generation.

        Raises:
            ValueError: If rows are padded on the left and there is no cache (seen on a CPU only:
                elsewhere the check would wait for the device).
        """
        valid = batch.get("valid")
        if valid is not None and cache is None and _pads_left(valid):
            raise ValueError("`valid` has rows padded on the left, which need a cache")
        dtype = torch.promote_types(self.parameter_dtype(), torch.float32)

        def turned(rotary: Rotary) -> tuple[Tensor, Tensor]:
            positions = batch.get("position_ids")
            if positions is not None:
                return rotary.at(positions, dtype=dtype)
            ids = batch["input_ids"]
            return rotary.table(ids.shape[1], device=ids.device, dtype=dtype)

        tables = {each: turned(each) for each in set(self.rotary_of_layers.values())}
        return SequenceContext(
            rotary=None if self.rotary is None else turned(self.rotary),
            rotary_of_layers={i: tables[each] for i, each in self.rotary_of_layers.items()},
            cu_seqlens=batch.get("cu_seqlens"),
            mask=None if cache is None else cache.mask(self.parameter_dtype()),
            valid=valid,
            # Without dropout no layer need make its key.
            dropout_key=batch.get("dropout_key") if self.has_dropout else None,
            token_index=batch.get("token_index"),
        )

    def run_blocks(
        self,
        stream: Stream,
        context: SequenceContext,
        cache: DecoderCache | None = None,
        *,
        layers: Sequence[int] | None = None,
    ) -> tuple[Stream, Auxiliary]:
        """Run the blocks that are here, or some of them, in order.

        Args:
            stream: From `embed`, or from the blocks of the stage before.
            context: From `context`.
            cache: In generation.
            layers: Which; `None`: all that are here.

        Returns:
            The stream after them, and the further losses and statistics of these blocks.
        """
        auxiliary = no_auxiliary()
        for name in self.blocks if layers is None else map(str, layers):
            block = self.blocks[name]
            layer_cache = None if cache is None else cache.layers[name]
            stream, more = block(stream, context.at_layer(int(name)), layer_cache)
            auxiliary = add_layer(auxiliary, name, more)
        return stream, auxiliary

    def residual(self, stream: Stream) -> Tensor:
        """Return the residual stream with all that blocks have added to it.

        Args:
            stream: Between blocks or after the last.

        Returns:
            Shape (B, S, H).
        """
        return stream.x

    def head(self, stream: Stream, labels: Tensor | None = None) -> HeadOutput:
        """Normalise and compare with the vocabulary.

        Args:
            stream: After the last block.
            labels: Shape (B, S), -100 where there is none; with them the loss is computed and
                logits are not.
        """
        x = self.final_norm(self.residual(stream))
        weight = self.embedding.weight if self.lm_head is None else self.lm_head.weight
        scale = 1.0 if self.config.m_width is None else 1.0 / self.config.m_width
        bound = self.config.logit_softcap
        if labels is None:
            logits = self.linear_logits(x, weight)
            logits = logits if scale == 1.0 else logits * scale
            return HeadOutput(logits if bound is None else bound * (logits / bound).tanh(), None)
        nll = self.linear_nll(
            x.flatten(0, 1),
            weight,
            labels.flatten(),
            logit_scale=scale,
            softcap=bound,
            reduction="sum",
        )
        return HeadOutput(None, nll)

    def new_cache(self, batch_size: int, max_length: int) -> DecoderCache:
        """Make an empty cache on the model's device, in its dtype.

        Args:
            batch_size: Rows.
            max_length: Most tokens that a row will hold, padding included.
        """
        weight = next(self.parameters())
        layers = {
            name: block.new_cache(batch_size, max_length, device=weight.device, dtype=weight.dtype)
            for name, block in self.blocks.items()
            if isinstance(block, Block)
        }
        return DecoderCache(layers)

    def parameter_dtype(self) -> torch.dtype:
        """Dtype of the parameters, and so of the activations."""
        return next(self.parameters()).dtype

    def initial_value(self, name: str, region: tuple[slice, ...] | None = None) -> Tensor:
        """Compute initial values of a parameter or buffer: the same bits for any cut of it.

        Args:
            name: Fully qualified name in the whole model.
            region: One slice a dim; `None` is the whole.

        Returns:
            float32 on the CPU, of the region's shape.

        Raises:
            KeyError: If there is no such parameter or buffer.
        """
        key = random.key_of(self.seed, name)
        spec = self.specs[name] if name in self.specs else self.specs_of_buffers[name]
        return spec.initial(key, self.shapes[name], region)

    @torch.no_grad()
    def initialize(self) -> None:
        """Set parameters and buffers to their initial values, in place."""
        for name, tensor in (*self.named_parameters(), *self.named_buffers()):
            tensor.copy_(self.initial_value(name))

    def materialize(
        self, device: torch.device | str, dtype: torch.dtype = torch.float32
    ) -> "Decoder":
        """Give a model built on the meta device memory and initial values.

        Args:
            device: Where to.
            dtype: Dtype of the parameters.

        Returns:
            The model itself.
        """
        self.to(dtype).to_empty(device=device)
        self.initialize()
        return self

    def _learned_positions(self, batch: Batch, length: int) -> Tensor:
        """Rows of the position table, shape (S, H) or (B, S, H)."""
        if self.position_embedding is None:
            raise RuntimeError("this model has no position table")
        positions = batch.get("position_ids")
        if positions is not None:
            return self.position_embedding(positions)
        if length > self.config.max_position_embeddings:
            raise ValueError(
                f"a sequence of {length} tokens passes `max_position_embeddings` "
                f"({self.config.max_position_embeddings})"
            )
        return self.position_embedding.weight[:length]


def _pads_left(valid: Tensor) -> bool:
    """Say whether rows are seen to be padded before a token; only a CPU's are looked at."""
    return valid.device.type == "cpu" and bool((valid[:, 1:] & ~valid[:, :-1]).any())


def parameter_traits(model: Decoder) -> dict[str, ParameterTraits]:
    """Say how an optimizer treats each parameter.

    Args:
        model: A decoder, before or after it was wrapped.

    Returns:
        By fully qualified name in the whole model.
    """
    return {
        name: ParameterTraits(weight_decay=spec.weight_decay, mup=spec.mup)
        for name, spec in model.specs.items()
    }
