"""Our models as lme-convert's certificates ask for them."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lme_cli.models import Source, load_model
from lme_core.architectures.decoder import Decoder
from lme_kernels.policy import KernelArgs, KernelPolicy


class BuiltModel:
    """A decoder whose logits and residual stream can be looked at."""

    def __init__(self, model: Decoder) -> None:
        """Take a model in evaluation mode."""
        self._model = model

    def logits(self, input_ids: Tensor) -> Tensor:
        """Give logits of shape (B, S, V) for token ids of shape (B, S)."""
        logits = self._model({"input_ids": input_ids}).logits
        if logits is None:
            raise RuntimeError("the model gave no logits though asked for them")
        return logits

    def hidden_states(self, input_ids: Tensor) -> list[Tensor]:
        """Give what enters the first block and what leaves each, (B, S, H) each."""
        batch = {"input_ids": input_ids}
        context = self._model.context(batch)
        stream = self._model.embed(batch)
        states = [self._model.residual(stream)]
        for name, block in self._model.blocks.items():
            stream, _ = block(stream, context.at_layer(int(name)), None)
            states.append(self._model.residual(stream))
        return states


def build_for_certificate(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> BuiltModel:
    """Build a converted model with the torch references, fp32 on CPU."""

    def fill(targets: Mapping[str, Tensor]) -> None:
        for name, target in targets.items():
            target.copy_(tensors[name])

    model = load_model(
        Source(config, fill, None, "the converted model"),
        device=torch.device("cpu"),
        dtype=torch.float32,
        kernels=KernelPolicy.from_args(KernelArgs(kernels=[])),
    )
    return BuiltModel(model)
