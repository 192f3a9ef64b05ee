"""Scaled dot-product attention: one call over the kernels that torch and others bring."""

from torch import Tensor

from lme_kernels.op import Backend, Op
from lme_kernels.ops.attention import reference
from lme_kernels.ops.attention.options import AttentionOptions

ATTENTION = Op(
    name="attention",
    reference=reference.attention,
    implementations={
        "sdpa": "lme_kernels.ops.attention._sdpa",
        "flash_varlen": "lme_kernels.ops.attention._flash_varlen",
        "flex": "lme_kernels.ops.attention._flex",
        "cudnn": "lme_kernels.ops.attention._cudnn",
        "flash": "lme_kernels.ops.attention._flash",
        "efficient": "lme_kernels.ops.attention._efficient",
        "flash_attention_2": "lme_kernels.ops.attention._flash_attention_2",
        "flash_attention_3": "lme_kernels.ops.attention._flash_attention_3",
        "flash_attention_4": "lme_kernels.ops.attention._flash_attention_4",
    },
    manual=frozenset(
        {
            "cudnn",
            "flash",
            "efficient",
            "flash_attention_2",
            "flash_attention_3",
            "flash_attention_4",
        }
    ),
)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
    sinks: Tensor | None = None,
    deterministic: bool = False,
    backend: Backend | str | None = None,
) -> Tensor:
    """Average the values, weighted by the softmax of the scaled products of query and keys.

    Args:
        query: Shape (B, S, N, D).
        key: Shape (B, T, K, D); each of its heads serves N / K query heads.
        value: Shape (B, T, K, Dv).
        causal: Whether a query sees no later key; the last query is aligned with the last key.
        scale: Factor of the products; `None` for 1 / sqrt(D).
        window: Number of keys a query sees, itself and `window - 1` before it (without `causal`
            as many after it); `None` for all.
        softcap: Bound on the scaled products' magnitude, `softcap * tanh(score / softcap)`, above
            0; `None` for no bound.
        cu_seqlens: Starts of the documents in the batch's B * S tokens taken in order, and B * S
            at the end, shape (documents + 1,), integer; tokens see their own document only. No
            document goes on in the next row. Needs T = S.
        mask: Added to the scores, shape (B, 1 or N, S, T); -inf hides a key.
        sinks: A score for each head that takes its share of the softmax and has no value, shape
            (N,).
        deterministic: Whether the backward must give the same bits each time.
        backend: Implementation to run: "torch" (explicit softmax), "sdpa", "cudnn", "flash",
            "efficient", "flash_varlen", "flex", "flash_attention_2", "flash_attention_3", "flash_attention_4";
            `None` takes the fastest one proven for the call.

    Returns:
        Shape (B, S, N, Dv), dtype of `query`. A query that sees no key gets zeros.

    Raises:
        ValueError: If the shapes do not fit or an option is out of range.
        UnsupportedBackendError: If `backend` is named and cannot serve the call.

    Source: Vaswani et al. 2017, equation 1 (arXiv:1706.03762); Ainslie et al. 2023 for shared key
    heads (arXiv:2305.13245); Gemma 2 for the bound (arXiv:2408.00118); sinks as in gpt-oss.
    """
    _check(query, key, value, window, softcap, cu_seqlens, mask, sinks)
    options = AttentionOptions(causal, scale, window, softcap, deterministic)
    tensors = (query, key, value, cu_seqlens, mask, sinks)
    return ATTENTION.choose(backend, *tensors, options=options)(*tensors, options)


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: int | None,
    softcap: float | None,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
    sinks: Tensor | None,
) -> None:
    B, S, N, D = query.shape
    T, K = key.shape[1:3]
    if key.shape != (B, T, K, D) or value.shape[:3] != (B, T, K):
        raise ValueError(
            f"`key` and `value` must have shapes (B, T, K, {D}) and (B, T, K, Dv) with B = {B}, "
            f"got {tuple(key.shape)} and {tuple(value.shape)}"
        )
    if K == 0 or N % K:
        raise ValueError(f"`query` has {N} heads, which are no multiple of the {K} of `key`")
    if window is not None and window < 1:
        raise ValueError(f"`window` must be at least 1 (or `None` for all), got {window}")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"`softcap` must be above 0 (or `None` for no bound), got {softcap}")
    if cu_seqlens is not None and T != S:
        raise ValueError(f"`cu_seqlens` needs as many keys as queries, got {T} and {S}")
    if mask is not None and (mask.ndim != 4 or mask.shape[1] not in (1, N)):
        raise ValueError(f"`mask` must have shape (B, 1 or {N}, S, T), got {tuple(mask.shape)}")
    if sinks is not None and sinks.shape != (N,):
        raise ValueError(f"`sinks` must have shape {(N,)}, got {tuple(sinks.shape)}")
