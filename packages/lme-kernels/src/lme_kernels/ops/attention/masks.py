"""Which keys a query sees."""

import torch
from torch import Tensor


def document_of_token(cu_seqlens: Tensor, B: int, S: int) -> Tensor:
    """Number the documents.

    Args:
        cu_seqlens: Starts of the documents in B * S tokens, and B * S, shape (documents + 1,).
        B: Rows of the batch.
        S: Tokens in a row.

    Returns:
        Index of each token's document, shape (B, S), int64; empty documents are skipped.
    """
    tokens = torch.arange(B * S, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens, tokens, right=True).view(B, S)


def visible(
    query: Tensor, key: Tensor, causal: bool, window: int | None, cu_seqlens: Tensor | None
) -> Tensor | None:
    """Say which keys each query sees.

    Args:
        query: Shape (B, S, N, D).
        key: Shape (B, T, K, D).
        causal: As `attention` takes it.
        window: As `attention` takes it.
        cu_seqlens: As `attention` takes it.

    Returns:
        Boolean, shape (1 or B, 1, S, T); `None` if all are seen.
    """
    B, S, T = query.shape[0], query.shape[1], key.shape[1]
    if not causal and window is None and cu_seqlens is None:
        return None
    ahead = torch.arange(T, device=key.device) - torch.arange(
        T - S, T, device=key.device
    ).unsqueeze(-1)
    seen = torch.ones_like(ahead, dtype=torch.bool)
    if causal:
        seen = seen & (ahead <= 0)
    if window is not None:
        seen = seen & (ahead.abs() < window)
    seen = seen.view(1, 1, S, T)
    if cu_seqlens is not None:
        document = document_of_token(cu_seqlens, B, S)
        seen = seen & (document.unsqueeze(-1) == document.unsqueeze(-2)).unsqueeze(1)
    return seen
