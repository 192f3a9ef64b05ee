"""Attention by the FlashAttention 2 in torch, called directly: windows and packed documents.

`scaled_dot_product_attention` hands it neither; the kernels take both, forward and backward, and
are in torch's own library, so that nothing is compiled.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lme_kernels.custom_ops import define
from lme_kernels.ops.attention._packages import why_not_flash
from lme_kernels.ops.attention.options import AttentionOptions

# Documents are the second dimension of the kernels' grids.
MAX_DOCUMENTS = 65535
MAX_CHANNELS = 256
# The kernels copy 16 bytes at a time.
ALIGNMENT = 16
# "All keys on this side", to the kernels.
UNBOUNDED = -1


def why_not(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
    sinks: Tensor | None,
    options: AttentionOptions,
) -> str | None:
    """Say why torch's FlashAttention cannot serve a call."""
    reason = why_not_flash(query, key, mask, sinks)
    if reason is not None:
        return reason
    if options.softcap is not None:
        return "torch does not pass it a bound on the scores (`softcap`)"
    B, S, _, D = query.shape
    if S == 1:
        return "a single query is served by torch's other kernels"
    if key.shape[1] < S:
        return "there are queries before the first key"
    if key.dtype != query.dtype or value.dtype != query.dtype:
        return "query, key and value have different dtypes"
    if value.shape[-1] != D or D > MAX_CHANNELS or D % 8:
        return (
            f"heads have {D} channels and values {value.shape[-1]}, and it takes equal multiples "
            f"of 8 up to {MAX_CHANNELS}"
        )
    documents = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if documents < 1 or documents > MAX_DOCUMENTS:
        return f"there are {documents} documents, and it takes 1 to {MAX_DOCUMENTS}"
    return _why_not_device(query.get_device())


def suits(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
    sinks: Tensor | None,
    options: AttentionOptions,
) -> bool:
    """Whether it is the fastest: where keys are hidden that other kernels would read."""
    return cu_seqlens is not None or options.window is not None or options.deterministic


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
    sinks: Tensor | None,
    options: AttentionOptions,
) -> Tensor:
    """Attend by torch's FlashAttention, every row or document a sequence of its own."""
    B, S = query.shape[:2]
    T = key.shape[1]
    if cu_seqlens is None:
        starts_q = torch.arange(0, B * S + 1, S, device=query.device, dtype=torch.int32)
        starts_k = torch.arange(0, B * T + 1, T, device=query.device, dtype=torch.int32)
    else:
        starts_q = starts_k = cu_seqlens.to(torch.int32).contiguous()
    left = UNBOUNDED if options.window is None else options.window - 1
    y = _Attend.apply(
        query.flatten(0, 1),
        key.flatten(0, 1),
        value.flatten(0, 1),
        starts_q,
        starts_k,
        # No document is longer than its row.
        S,
        T,
        options.causal,
        options.factor(query.shape[-1]),
        left,
        0 if options.causal else left,
        options.deterministic,
    )
    return y.unflatten(0, (B, S))


class _Attend(torch.autograd.Function):
    # Arguments as the launches below take them.
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        starts_q: Tensor,
        starts_k: Tensor,
        max_q: int,
        max_k: int,
        causal: bool,
        scale: float,
        left: int,
        right: int,
        deterministic: bool,
    ) -> Tensor:
        y, lse = _forward(
            query, key, value, starts_q, starts_k, max_q, max_k, causal, scale, left, right
        )
        ctx.save_for_backward(query, key, value, y, lse, starts_q, starts_k)
        ctx.options = (max_q, max_k, causal, scale, left, right, deterministic)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        gradients = _backward(grad, *ctx.saved_tensors, *ctx.options)
        return (*gradients, *(None,) * 9)


def _fake_forward(
    query: Tensor, key: Tensor, value: Tensor, *options: object
) -> tuple[Tensor, Tensor]:
    lse = query.new_empty(query.shape[1], query.shape[0], dtype=torch.float32)
    return query.new_empty(query.shape), lse


@define(
    "attention_flash_varlen_forward(Tensor query, Tensor key, Tensor value, Tensor starts_q, "
    "Tensor starts_k, SymInt max_q, SymInt max_k, bool causal, float scale, int left, int right) "
    "-> (Tensor, Tensor)",
    _fake_forward,
)
def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts_q: Tensor,
    starts_k: Tensor,
    max_q: int,
    max_k: int,
    causal: bool,
    scale: float,
    left: int,
    right: int,
) -> tuple[Tensor, Tensor]:
    """Attend.

    Args:
        query: Shape (B * S, N, D).
        key: Shape (B * T, K, D).
        value: Shape (B * T, K, D).
        starts_q: Starts of the documents' queries and the end, int32, shape (documents + 1,).
        starts_k: Starts of the documents' keys and the end.
        max_q: Bound on the queries of a document.
        max_k: Bound on the keys of a document.
        causal: Whether a query sees no later key, the last query aligned with the last key.
        scale: Factor of the scores.
        left: Keys seen before a query's own; -1 for all.
        right: Keys seen after it; -1 for all.

    Returns:
        Averages, shape (B * S, N, D), and logarithms of the sums of exponentials (N, B * S), fp32.
    """
    y, lse = torch.ops.aten._flash_attention_forward(
        _aligned(query),
        _aligned(key),
        _aligned(value),
        starts_q,
        starts_k,
        max_q,
        max_k,
        0.0,
        causal,
        False,
        scale=scale,
        window_size_left=left,
        window_size_right=right,
    )[:2]
    return y.contiguous(), lse


def _fake_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *options: object
) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


@define(
    "attention_flash_varlen_backward(Tensor grad, Tensor query, Tensor key, Tensor value, "
    "Tensor y, Tensor lse, Tensor starts_q, Tensor starts_k, SymInt max_q, SymInt max_k, "
    "bool causal, float scale, int left, int right, bool deterministic) "
    "-> (Tensor, Tensor, Tensor)",
    _fake_backward,
)
def _backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    y: Tensor,
    lse: Tensor,
    starts_q: Tensor,
    starts_k: Tensor,
    max_q: int,
    max_k: int,
    causal: bool,
    scale: float,
    left: int,
    right: int,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Differentiate; shapes as `_forward` takes them, gradients as the tensors they belong to."""
    # State of the dropout, which there is none of.
    state = torch.empty(2, dtype=torch.uint64, device=query.device)
    with _algorithms(deterministic):
        gradients = torch.ops.aten._flash_attention_backward(
            _aligned(grad),
            _aligned(query),
            _aligned(key),
            _aligned(value),
            y,
            lse,
            starts_q,
            starts_k,
            max_q,
            max_k,
            0.0,
            causal,
            state,
            state,
            scale=scale,
            window_size_left=left,
            window_size_right=right,
        )
    grad_query, grad_key, grad_value = (each.contiguous() for each in gradients)
    return grad_query, grad_key, grad_value


def _aligned(x: Tensor) -> Tensor:
    """Copy `x` unless its heads lie as the kernels read them: packed, 16 bytes at a time."""
    size = x.element_size()
    strides_fit = all(stride * size % ALIGNMENT == 0 for stride in x.stride()[:-1])
    if x.stride(-1) == 1 and strides_fit and (x.is_meta or x.data_ptr() % ALIGNMENT == 0):
        return x
    return x.clone(memory_format=torch.contiguous_format)


@contextmanager
def _algorithms(deterministic: bool) -> Iterator[None]:
    """Let torch sum gradients of queries in a fixed order: it takes that from its global flag."""
    before = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    if not deterministic or (before and not warns):
        yield
        return
    # The public function also sets flags of the compiler.
    torch._C._set_deterministic_algorithms(True, warn_only=False)
    try:
        yield
    finally:
        torch._C._set_deterministic_algorithms(before, warn_only=warns)


@torch.compiler.assume_constant_result
def _why_not_device(index: int) -> str | None:
    """Say why it cannot run on a CUDA device."""
    if torch.version.hip is not None:
        return "its windows are tried on NVIDIA's GPUs only"
    if not torch.backends.cuda.is_flash_attention_available():
        return "this torch was built without it"
    if torch.cuda.get_device_capability(index) < (8, 0):
        return "it needs compute capability 8.0"
    return None
