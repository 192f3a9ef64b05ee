"""Blocks of attention by torch's FlashAttention, which gives the logarithms that merging needs."""

import torch
from torch import Tensor

from lme_parallel.context.blocks import Block, Rules

# The operators behind `scaled_dot_product_attention`, which itself keeps the logarithms back.
_OPS = torch.ops.aten


def is_flash(query: Tensor, value: Tensor, rules: Rules) -> bool:
    """Say whether the kernels serve a call's shapes and dtype."""
    D = query.shape[-1]
    fits = query.dtype in (torch.float16, torch.bfloat16) and D % 8 == 0 and D <= 256
    return query.is_cuda and fits and value.shape[-1] == D and rules.softcap is None


def is_flash_block(block: Block, rules: Rules) -> bool:
    """Say whether what queries see in a block is all, or all that is not later."""
    if block.is_full(rules.window):
        return True
    is_diagonal = block.query_start == block.key_start and block.queries == block.keys
    return is_diagonal and (rules.window is None or rules.window >= block.keys)


def attend_flash(
    query: Tensor, key: Tensor, value: Tensor, block: Block, rules: Rules
) -> tuple[Tensor, Tensor]:
    """Attend to the keys of one block; as `attend_block`."""
    q, k, v = (each.transpose(1, 2) for each in (query, key, value))
    output, sums, *_ = _OPS._scaled_dot_product_flash_attention(
        q, k, v, 0.0, not block.is_full(rules.window), False, scale=rules.scale
    )
    return output.transpose(1, 2).float(), sums.transpose(1, 2)


def flash_gradients(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad: Tensor,
    output: Tensor,
    sums: Tensor,
    block: Block,
    rules: Rules,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what one block adds to the gradients; as `block_gradients`, from the whole output."""
    q, k, v, g, o = (each.transpose(1, 2) for each in (query, key, value, grad, output))
    seed, offset = _no_random(query.device)
    grads = _OPS._scaled_dot_product_flash_attention_backward(
        g.to(q.dtype),
        q,
        k,
        v,
        o.to(q.dtype),
        sums.transpose(1, 2).contiguous(),
        None,
        None,
        block.queries,
        block.keys,
        0.0,
        not block.is_full(rules.window),
        seed,
        offset,
        scale=rules.scale,
    )
    query_grad, key_grad, value_grad = (each.transpose(1, 2).float() for each in grads)
    return query_grad, key_grad, value_grad


def attend_packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: tuple[Tensor, Tensor],
    rules: Rules,
) -> tuple[Tensor, Tensor]:
    """Attend to the earlier tokens of the same documents.

    Args:
        query: Shape (B, S, N, D), one piece of each row.
        key: Shape (B, T, K, D), of all tokens up to the end of that piece.
        value: Shape (B, T, K, D).
        bounds: Of the documents, int32, (documents + 1,): over the B * S queries, and over the
            B * T keys.
        rules: What a query sees.

    Returns:
        As `attend_block`.
    """
    B, S = query.shape[:2]
    output, sums, *_ = _OPS._flash_attention_forward(
        *(each.flatten(0, 1).contiguous() for each in (query, key, value)),
        *bounds,
        S,
        key.shape[1],
        0.0,
        True,
        False,
        scale=rules.scale,
        window_size_left=None if rules.window is None else rules.window - 1,
        window_size_right=None if rules.window is None else 0,
    )
    return output.unflatten(0, (B, S)).float(), sums.mT.unflatten(0, (B, S))


def packed_gradients(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad: Tensor,
    output: Tensor,
    sums: Tensor,
    bounds: tuple[Tensor, Tensor],
    rules: Rules,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of `attend_packed`, given the final output and logarithms."""
    B, S = query.shape[:2]
    dtype = query.dtype
    flat = [each.flatten(0, 1).to(dtype) for each in (grad, query, key, value, output)]
    grads = _OPS._flash_attention_backward(
        *(each.contiguous() for each in flat),
        sums.flatten(0, 1).mT.contiguous(),
        *bounds,
        S,
        key.shape[1],
        0.0,
        True,
        *_no_random(query.device),
        scale=rules.scale,
        window_size_left=None if rules.window is None else rules.window - 1,
        window_size_right=None if rules.window is None else 0,
    )
    query_grad, key_grad, value_grad = (each.unflatten(0, (B, -1)).float() for each in grads)
    # Documents without a query are not written.
    of_queries, of_keys = bounds
    tokens = torch.arange(B * key.shape[1], device=key.device, dtype=of_keys.dtype)
    document = torch.searchsorted(of_keys, tokens, right=True) - 1
    has_query = (of_queries.diff() > 0)[document].view(B, -1, 1, 1)
    return query_grad, key_grad.where(has_query, 0.0), value_grad.where(has_query, 0.0)


def _no_random(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the state of a generator from which nothing is drawn."""
    seed = torch.empty(2, dtype=torch.uint64, device=device)
    return seed, torch.empty((), dtype=torch.uint64, device=device)
