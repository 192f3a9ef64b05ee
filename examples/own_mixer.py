"""Add a sequence mixer from outside lme-core: one file, and one line in a union.

The mixer is a gated exponential moving average. It resets at document boundaries, skips padding in
generation, and keeps one vector a row as its cache. The line is `MyMixer` below; inside lme-core
it would stand in `lme_core/mixers/__init__.py`. Run it with `python examples/own_mixer.py`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lme_core.architectures.gpt_base import GPTBaseConfig
from lme_core.generation import generate
from lme_core.layers.context import SequenceContext
from lme_core.layers.initialization import linear_std
from lme_core.layers.linear import Linear
from lme_core.layers.settings import ModelSettings
from lme_core.mixers import MixerConfig
from lme_core.mixers.base import LayerCache
from lme_core.mixers.recurrent import RecurrentMixer, RecurrentMixerConfig
from lme_core.mixers.softmax_attention import SoftmaxAttentionConfig
from lme_core.mlps.dense import DenseMLPConfig
from lme_kernels.ops.linear_attention import LINEAR_ATTENTION
from lme_kernels.policy import KernelPolicy


@dataclass(frozen=True, slots=True, kw_only=True)
class MovingAverageConfig(RecurrentMixerConfig):
    """Average of the tokens so far, in which older ones fade; how fast is up to each token."""

    sequence_mixer_type: Literal["moving_average"] = "moving_average"
    """Kind of mixer."""
    num_heads: int
    """Groups of channels that fade together."""

    def check(self, settings: ModelSettings) -> None:
        """Check what depends on the architecture.

        Raises:
            ValueError: If the heads do not divide the width.
        """
        if settings.hidden_size % self.num_heads:
            raise ValueError(
                f"`num_heads` ({self.num_heads}) must divide `hidden_size` ({settings.hidden_size})"
            )

    def forward_flops(self, settings: ModelSettings, sequence_length: int) -> float:
        """Matrix products of a forward pass, in operations per token."""
        H = settings.hidden_size
        return 2.0 * H * (3 * H + self.num_heads)

    def build(self, settings: ModelSettings, layer: int, kernels: KernelPolicy) -> "MovingAverage":
        """Build the module of one layer."""
        return MovingAverage(self, settings, kernels)


class MovingAverage(RecurrentMixer):
    """h_t = f_t h_{t-1} + (1 - f_t) v_t in every channel, times a gate."""

    shard_plan: ClassVar[Mapping[str, str] | None] = {}

    def __init__(
        self, config: MovingAverageConfig, settings: ModelSettings, kernels: KernelPolicy
    ) -> None:
        """Allocate without initialising."""
        super().__init__(kernels)
        H, N = settings.hidden_size, config.num_heads
        # Rows: values, gates, fading.
        self.sizes = [H, H, N]
        self.input = Linear(H, 2 * H + N, bias=False, std=linear_std(settings, H), mup=True)
        self.output = Linear(H, H, bias=False, std=linear_std(settings, H, output=True), mup=True)
        # Linear attention with one key channel, which is always one, is a moving average.
        self.average = kernels.bind(LINEAR_ATTENTION)
        self.state_shape = (N, 1, H // N)

    def forward(self, x: Tensor, context: SequenceContext, cache: LayerCache | None) -> Tensor:
        """Mix along the sequence."""
        sequences = self.sequences(x, context, cache)
        value, gate, fade = self.pack(self.input(x), sequences).split(self.sizes, dim=-1)
        log_kept = torch.nn.functional.logsigmoid(fade)
        value = value.unflatten(-1, (fade.shape[-1], -1)) * torch.sigmoid(-fade)[..., None]
        ones = torch.ones_like(value[..., :1])

        def run(initial: Tensor | None) -> tuple[Tensor, Tensor]:
            return self.average(
                ones,
                ones,
                value,
                log_decay=log_kept,
                initial_state=initial,
                return_final_state=True,
                cu_seqlens=sequences.cu_seqlens,
                chunk_size=sequences.chunk_size(64),
            )

        y = self.recur(run, sequences, cache, log_kept).flatten(-2)
        return self.output(self.unpack(y * torch.sigmoid(gate), sequences))


# The one line.
MyMixer = MixerConfig | MovingAverageConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class MyModelConfig(GPTBaseConfig):
    """Pre-norm decoder that knows one mixer more."""

    # A checker refuses a wider type than the parent's; nothing writes to a frozen field.
    sequence_mixer_blocks: tuple[MyMixer, ...] | None = None  # pyright: ignore[reportIncompatibleVariableOverride]
    """Sequence mixer of each layer; one entry stands for every layer."""


CONFIG = MyModelConfig(
    vocab_size=32,
    hidden_size=32,
    num_layers=2,
    rope_dim=16,
    use_depth_scaled_init=False,
    sequence_mixer_blocks=(
        MovingAverageConfig(num_heads=4),
        SoftmaxAttentionConfig(num_attention_heads=2, num_key_value_heads=1),
    ),
    mlp_blocks=(DenseMLPConfig(activation_function="swiglu", intermediate_size=64),),
)


def batches(steps: int) -> Iterator[dict[str, Tensor]]:
    """Sequences that count upwards in steps of their own."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        first = torch.randint(0, 32, (8, 1), generator=generator)
        stride = torch.randint(1, 4, (8, 1), generator=generator)
        tokens = (first + stride * torch.arange(17)) % 32
        yield {"input_ids": tokens[:, :-1], "labels": tokens[:, 1:]}


def train(steps: int) -> list[float]:
    """Train a small model and return the loss of each step, in nats per token."""
    model = replace(CONFIG).build(KernelPolicy(), seed=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for batch in batches(steps):
        nll = model(batch, logits=False).nll_sum
        loss = nll / batch["labels"].numel()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    prompt = torch.tensor([[3, 5, 7, 9, 11, 13]])
    print("3 5 7 9 11 13 ->", generate(model, prompt, max_new_tokens=6, temperature=0).tolist())
    return losses


if __name__ == "__main__":
    losses = train(120)
    print(f"loss: {losses[0]:.2f} -> {losses[-1]:.2f} nats per token")
