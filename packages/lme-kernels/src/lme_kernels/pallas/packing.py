"""Packed sequences by their offsets, in jax."""

import jax.numpy as jnp
from jax import Array


def check_cu_seqlens(cu_seqlens: Array) -> int:
    """Check the shape and dtype of offsets and count the sequences.

    Args:
        cu_seqlens: Offsets as a caller gave them.

    Returns:
        Number of sequences.

    Raises:
        ValueError: If they are not integers of shape (sequences + 1,).
    """
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"`cu_seqlens` must have shape (sequences + 1,), got {cu_seqlens.shape}")
    if not jnp.issubdtype(cu_seqlens.dtype, jnp.integer):
        raise ValueError(f"`cu_seqlens` must have an integer dtype, got {cu_seqlens.dtype}")
    return cu_seqlens.shape[0] - 1


def sequence_ids(cu_seqlens: Array, total_tokens: int) -> Array:
    """Say which sequence each packed token belongs to, shape (total_tokens,), dtype of offsets."""
    tokens = jnp.arange(total_tokens, dtype=cu_seqlens.dtype)
    found = jnp.searchsorted(cu_seqlens, tokens, side="right") - 1
    return found.astype(cu_seqlens.dtype)
