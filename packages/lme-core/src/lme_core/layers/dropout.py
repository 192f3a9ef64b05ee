"""Dropout whose mask is a function of what it drops, not of when."""

import torch
from torch import Tensor

from lme_core.layers import random


def dropout(x: Tensor, p: float, key: Tensor | None, site: int, token_index: Tensor) -> Tensor:
    """Zero elements at random and scale the rest by 1 / (1 - p).

    Args:
        x: Activations, shape (B, S, C).
        p: Probability of zero, in [0, 1).
        key: 0-d int64, a hash of seed, step and layer; `None` in evaluation, when nothing drops.
        site: Number of this dropout among those that share `key`.
        token_index: int64, shape (B, S): each token's position in the global batch.

    Returns:
        Shape and dtype of `x`. Each mask element depends on `key`, `site`, `token_index` and
        channel alone, so it is the same however the batch is cut.
    """
    if key is None or p == 0.0:
        return x
    token_key = random.mix(random.mix(key, site + 1), token_index)[..., None]
    channels = torch.arange(x.shape[-1], device=x.device)
    # Not `uniform(token_key, channels)`: Inductor reads a counter times a constant as an address and
    # makes wrong code of it once it passes 64 bits.
    keep = random.uniform(token_key ^ channels, 1) >= p
    return torch.where(keep, x / (1.0 - p), 0.0)


def check_probability(name: str, p: float) -> None:
    """Refuse a dropout probability outside [0, 1).

    Raises:
        ValueError: If `p` is; the message names `name`.
    """
    if not 0.0 <= p < 1.0:
        raise ValueError(f"`{name}` must be at least 0 and below 1, got {p}")
