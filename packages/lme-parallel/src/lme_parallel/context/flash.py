"""Blocks of attention by torch's FlashAttention, which gives the logarithms that merging needs."""

import torch
from torch import Tensor
from torch.nn import functional as F

from lme_parallel.context.blocks import Block, Rules

# The operators behind `scaled_dot_product_attention`, which itself keeps the logarithms back.
_OPS = torch.ops.aten


def is_flash(query: Tensor, value: Tensor, rules: Rules) -> bool:
    """Say whether the kernels serve a call's shapes and dtype."""
    D = query.shape[-1]
    fits = query.dtype in (torch.float16, torch.bfloat16) and D % 8 == 0 and D <= 256
    # Values may be shorter, as in latent attention: they are filled up.
    return query.is_cuda and fits and value.shape[-1] <= D and rules.softcap is None


def is_flash_block(block: Block, rules: Rules, *, packed: bool) -> bool:
    """Say whether what queries see in a block is all, or all up to their own place.

    Args:
        block: Queries and keys.
        rules: What a query sees.
        packed: Whether documents are kept apart; if so, windows are served too.
    """
    if block.is_full(rules.window):
        return True
    if packed:
        # Of every document here the last query is at the last key.
        return block.query_start + block.queries == block.key_start + block.keys
    is_diagonal = block.query_start == block.key_start and block.queries == block.keys
    return is_diagonal and (rules.window is None or rules.window >= block.keys)


def attend_flash(
    query: Tensor, key: Tensor, value: Tensor, block: Block, rules: Rules
) -> tuple[Tensor, Tensor]:
    """Attend to the keys of one block without documents; as `attend_block`."""
    q, k, v = (each.transpose(1, 2) for each in (query, key, _filled(value, query)))
    output, sums, *_ = _OPS._scaled_dot_product_flash_attention(
        q, k, v, 0.0, not block.is_full(rules.window), False, scale=rules.scale
    )
    return output.transpose(1, 2)[..., : value.shape[-1]].float(), sums.transpose(1, 2)


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
    of_values = (_filled(each, query) for each in (value, grad, output))
    q, k, v, g, o = (each.transpose(1, 2) for each in (query, key, *of_values))
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
    return query_grad, key_grad, value_grad[..., : value.shape[-1]]


def attend_packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: tuple[Tensor, Tensor],
    block: Block,
    rules: Rules,
) -> tuple[Tensor, Tensor]:
    """Attend to the keys of one block that are of the query's document; as `attend_block`.

    Args:
        query: Shape (B, S, N, D).
        key: Shape (B, T, K, D).
        value: Shape (B, T, K, D).
        bounds: Of the documents, int32, (documents + 1,): over the B * S queries, and over the
            B * T keys.
        block: Where they are.
        rules: What a query sees.
    """
    B, S = query.shape[:2]
    causal, options = _options(block, rules)
    output, sums, *_ = _OPS._flash_attention_forward(
        *(each.flatten(0, 1).contiguous() for each in (query, key, _filled(value, query))),
        *bounds,
        S,
        key.shape[1],
        0.0,
        causal,
        False,
        **options,
    )
    output = output[..., : value.shape[-1]].unflatten(0, (B, S)).float()
    sums = sums.mT.unflatten(0, (B, S))
    sees = _has_both(bounds, bounds[0], query)
    return output.where(sees, 0.0), sums.where(sees[..., 0], float("-inf"))


def packed_gradients(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad: Tensor,
    output: Tensor,
    sums: Tensor,
    bounds: tuple[Tensor, Tensor],
    block: Block,
    rules: Rules,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `attend_packed` adds to the gradients; as `flash_gradients`."""
    B, S = query.shape[:2]
    causal, options = _options(block, rules)
    g, v, o = (_filled(each, query) for each in (grad, value, output))
    flat = [each.flatten(0, 1).to(query.dtype) for each in (g, query, key, v, o)]
    grads = _OPS._flash_attention_backward(
        *(each.contiguous() for each in flat),
        sums.flatten(0, 1).mT.contiguous(),
        *bounds,
        S,
        key.shape[1],
        0.0,
        causal,
        *_no_random(query.device),
        **options,
    )
    query_grad, key_grad, value_grad = (each.unflatten(0, (B, -1)).float() for each in grads)
    # What is of documents without a query, or without a key, may not have been written.
    sees, is_seen = _has_both(bounds, bounds[0], query), _has_both(bounds, bounds[1], key)
    value_grad = value_grad[..., : value.shape[-1]]
    return query_grad.where(sees, 0.0), key_grad.where(is_seen, 0.0), value_grad.where(is_seen, 0.0)


def _filled(x: Tensor, query: Tensor) -> Tensor:
    """Fill channels of values up to those of queries; zeros change nothing."""
    return F.pad(x, (0, query.shape[-1] - x.shape[-1]))


def _options(block: Block, rules: Rules) -> tuple[bool, dict[str, float | int]]:
    """Return whether later keys are hidden, and the scale and window."""
    options: dict[str, float | int] = {"scale": rules.scale}
    if block.is_full(rules.window):
        return False, options
    if rules.window is not None:
        options |= {"window_size_left": rules.window - 1, "window_size_right": 0}
    return True, options


def _has_both(bounds: tuple[Tensor, Tensor], here: Tensor, x: Tensor) -> Tensor:
    """Say of which tokens the document has queries and keys.

    Args:
        bounds: As `attend_packed`.
        here: One of them.
        x: What it is over, shape (B, tokens of a row, ...).

    Returns:
        Shape (B, tokens of a row, 1, 1), bool.
    """
    of_queries, of_keys = bounds
    has_both = (of_queries.diff() > 0) & (of_keys.diff() > 0)
    B, length = x.shape[:2]
    return has_both.repeat_interleave(here.diff(), output_size=B * length).view(B, length, 1, 1)


def _no_random(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the state of a generator from which nothing is drawn."""
    seed = torch.empty(2, dtype=torch.uint64, device=device)
    return seed, torch.empty((), dtype=torch.uint64, device=device)
