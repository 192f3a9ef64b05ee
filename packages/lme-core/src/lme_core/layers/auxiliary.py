"""What a block gives besides the residual stream: further losses and statistics."""

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor


class Auxiliary(NamedTuple):
    """Further losses and statistics, as results.

    No module keeps them, so a block that runs again in the backward pass counts once, and a
    pipeline stage can pass them on.
    """

    losses: Mapping[str, Tensor]
    """0-d each, a sum over the batch's sequences, with its gradient; layers add up."""
    statistics: Mapping[str, Tensor]
    """Of any shape, sums over the batch, without gradient; layers are kept apart."""


def no_auxiliary() -> Auxiliary:
    """Return nothing: what a block without further losses gives."""
    return Auxiliary({}, {})


def add_layer(total: Auxiliary, layer: str, more: Auxiliary) -> Auxiliary:
    """Add what one layer gave.

    Args:
        total: Of the layers before.
        layer: Index of the layer in the whole model; statistics are called `name.layer`.
        more: Of this layer, by names that hold for every layer.

    Returns:
        The sum; the arguments stay as they are.
    """
    if not more.losses and not more.statistics:
        return total
    losses = {
        **total.losses,
        **{
            name: total.losses[name] + loss if name in total.losses else loss
            for name, loss in more.losses.items()
        },
    }
    named = {f"{name}.{layer}": value for name, value in more.statistics.items()}
    return Auxiliary(losses, {**total.statistics, **named})
