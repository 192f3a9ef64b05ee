"""Between steps: how evenly experts were used, and the biases that even it out."""

from collections.abc import Mapping

import torch
from torch import Tensor

from lme_core.config import ModelConfig
from lme_core.mlps.moe import MoEConfig

_COUNTS, _ENTROPY, _TOKENS = "expert_counts.", "router_entropy.", "router_tokens."


def expert_metrics(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Turn the statistics of routers into numbers to log.

    Args:
        values: Of a step, over all micro batches and replicas; the routers' among them are
            `expert_counts.{layer}` (E,), `router_entropy.{layer}` and `router_tokens.{layer}`, all
            divided by one number.

    Returns:
        The other values as they are, and for each layer with experts, 0-d each:
        `expert_imbalance.{layer}`, the load of the busiest expert over the mean load;
        `expert_load_max.{layer}` and `expert_load_min.{layer}`, shares of all choices;
        `router_entropy.{layer}`, in nats per token.
    """
    metrics: dict[str, Tensor] = {}
    for name, value in values.items():
        if name.startswith(_COUNTS):
            layer = name.removeprefix(_COUNTS)
            load = value / value.sum()
            metrics[f"expert_imbalance.{layer}"] = load.max() * load.numel()
            metrics[f"expert_load_max.{layer}"] = load.max()
            metrics[f"expert_load_min.{layer}"] = load.min()
        elif name.startswith(_ENTROPY):
            layer = name.removeprefix(_ENTROPY)
            metrics[name] = value / values[f"{_TOKENS}{layer}"]
        elif not name.startswith(_TOKENS):
            metrics[name] = value
    return metrics


class ExpertBalance:
    """Moves each expert's bias for being chosen against its load, once an optimizer step.

    Source: Wang et al. 2024, algorithm 1 (arXiv:2408.15664).
    """

    def __init__(self, biases: Mapping[str, Tensor], rates: Mapping[str, float]) -> None:
        """Take the biases.

        Args:
            biases: Shape (E,) each, by layer; changed in place.
            rates: Step of each layer's biases.
        """
        self._biases = dict(biases)
        self._rates = dict(rates)

    @classmethod
    def of(cls, config: ModelConfig, buffers: Mapping[str, Tensor]) -> "ExpertBalance | None":
        """Find the biases of a model.

        Args:
            config: The architecture.
            buffers: A runtime's `named_buffers()`.

        Returns:
            What moves them; `None` where no layer has any that move.
        """
        rates = {
            str(layer): mlp.expert_bias_update_rate
            for layer, mlp in enumerate(config.mlps())
            if isinstance(mlp, MoEConfig) and mlp.expert_bias_update_rate
        }
        names = {layer: f"blocks.{layer}.mlp.router.selection_bias" for layer in rates}
        # A pipeline stage holds some of the layers.
        biases = {layer: buffers[name] for layer, name in names.items() if name in buffers}
        return cls(biases, rates) if biases else None

    @torch.no_grad()
    def __call__(self, values: Mapping[str, Tensor], finite: Tensor) -> None:
        """Move the biases; nothing waits for the device.

        Args:
            values: As of `expert_metrics`.
            finite: Whether the step was a step, 0-d bool; if not, nothing moves.
        """
        for layer, bias in self._biases.items():
            counts = values[f"{_COUNTS}{layer}"]
            step = self._rates[layer] * torch.sign(counts.mean() - counts)
            bias.add_(torch.where(finite, step, 0.0).to(bias))
