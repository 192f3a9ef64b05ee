"""The gated delta rule in Triton, by chunks.

One kernel prepares every chunk by itself: norms, decays, scores of queries and keys, and the inverse
of the chunk's triangular system. One walks each sequence, a block of value channels a program, and
writes outputs as it goes. The backward walks forwards again to keep the states before each chunk,
walks backwards for their gradients, and computes the gradients of the inputs of all chunks at once.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lme_kernels._triton_chunks import (
    Slots,
    as_tokens,
    block_of,
    precision_of,
    shared_bytes,
    sum_groups,
)
from lme_kernels.custom_ops import define
from lme_kernels.device import why_not_shared, why_not_triton
from lme_kernels.ops.gated_delta_rule._triton_inputs import inputs_kernel
from lme_kernels.ops.gated_delta_rule._triton_system import VECTORS, prepare_kernel
from lme_kernels.ops.gated_delta_rule._triton_walk import backward_kernel, forward_kernel
from lme_kernels.ops.gated_delta_rule.settings import chunk_of, delta_settings
from lme_kernels.ops.linear_attention.arguments import ChunkOptions, num_sequences
from lme_kernels.ops.linear_attention.chunks import chunk_table, first_chunks
from lme_kernels.tuning import ceil_div

MAX_CHANNELS = 256
MAX_CHANNELS_FLOAT32 = 128


def why_not(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
) -> str | None:
    reason = why_not_triton(query, key, value, log_decay, beta, initial_state)
    if reason is not None:
        return reason
    K, V = query.shape[-1], value.shape[-1]
    most = MAX_CHANNELS_FLOAT32 if query.dtype == torch.float32 else MAX_CHANNELS
    if not (1 <= K <= most and 1 <= V <= most):
        return f"heads have {K} and {V} channels, and in this dtype it takes from 1 to {most}"
    return why_not_shared(query, shared_bytes(K))


def gated_delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    l2_normalize: bool,
    options: ChunkOptions,
) -> tuple[Tensor, Tensor]:
    table = first = None
    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens.contiguous()
        size = chunk_of(query.dtype)
        table = chunk_table(cu_seqlens, query.shape[0], size)
        first = first_chunks(cu_seqlens, size)
    packing = (cu_seqlens, first, table)
    return _GatedDeltaRule.apply(
        query, key, value, log_decay, beta, initial_state, *packing, l2_normalize, options.scale
    )


class _GatedDeltaRule(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, log_decay, beta, initial, cu, first, table, norm, scale):
        y, final, *kept = _forward(
            query, key, value, log_decay, beta, initial, cu, first, table, norm, scale
        )
        ctx.save_for_backward(query, key, value, log_decay, beta, initial, cu, first, table, *kept)
        ctx.norm, ctx.scale = norm, scale
        ctx.set_materialize_grads(False)
        return y, final

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y, grad_final):
        tensors = ctx.saved_tensors
        *grads, grad_initial = _backward(grad_y, grad_final, *tensors, ctx.norm, ctx.scale)
        grad_initial = None if tensors[5] is None else grad_initial
        return *grads, grad_initial, None, None, None, None, None


def _heads(query, key, value):
    """Strides of the inputs as the kernels take them, after copies where need be."""
    rows = [as_tokens(each) for each in (query, key, value)]
    return [each[0] for each in rows], [stride for each in rows for stride in each[1:]]


def _slots(query, cu, first, table):
    size, S = chunk_of(query.dtype), query.shape[-3]
    if cu is None:
        count = query.shape[0] * ceil_div(S, size)
        return Slots(size, query.shape[0], S, count, None, None, None)
    return Slots(size, cu.shape[0] - 1, S, table.shape[1], cu, first, table)


def _shared(query, key, value, N, slots):
    """Constants of all kernels."""
    return {
        "N": N,
        "K": query.shape[-1],
        "QUERY_GROUP": N // query.shape[-2],
        "KEY_GROUP": N // key.shape[-2],
        "PACKED": slots.cu_seqlens is not None,
        "PRECISION": precision_of(query.dtype),
        "C": slots.chunk,
    }


def _exact(dtype):
    """How the systems are solved: always to more digits than the inverse is rounded to."""
    if dtype == torch.float32 or torch.version.hip:
        return "ieee"
    return "tf32x3" if dtype == torch.float16 else "tf32"


def _forward_fake(query, key, value, log_decay, beta, initial, cu, first, table, norm, scale):
    N, K, V = log_decay.shape[-1], query.shape[-1], value.shape[-1]
    size = chunk_of(query.dtype)
    y = query.new_empty((*query.shape[:-2], N, V))
    final = query if initial is None else initial
    count = query.shape[0] * ceil_div(query.shape[1], size) if table is None else table.shape[1]
    return (
        y,
        final.new_empty((num_sequences(query, cu), N, K, V)),
        query.new_empty((count, N, VECTORS, size), dtype=torch.float32),
        query.new_empty((count, N, size, size)),
        query.new_empty((count, N, size, size)),
    )


@define(
    "gated_delta_rule_forward(Tensor query, Tensor key, Tensor value, Tensor log_decay, "
    "Tensor beta, Tensor? initial, Tensor? cu_seqlens, Tensor? first, Tensor? table, "
    "bool normalize, float scale) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward_fake,
)
def _forward(query, key, value, log_decay, beta, initial, cu, first, table, norm, scale):
    results = _forward_fake(
        query, key, value, log_decay, beta, initial, cu, first, table, norm, scale
    )
    y, final, vectors, inverse, scores = results
    slots = _slots(query, cu, first, table)
    (query, key, value), strides = _heads(query, key, value)
    shared = _shared(query, key, value, log_decay.shape[-1], slots)
    if y.numel() > 0:
        _prepare(
            query, key, log_decay, beta, slots, strides, vectors, inverse, scores, norm, scale,
            shared,
        )  # fmt: skip
    kept = (vectors, inverse, scores)
    _walk(query, key, value, initial, slots, strides, kept, scale, shared, y=y, final=final)
    return results


def _prepare(
    query, key, log_decay, beta, slots, strides, vectors, inverse, scores, norm, scale, shared
):
    K = query.shape[-1]
    settings = delta_settings("prepare", query.dtype, K, 0, 0)
    prepare_kernel[(shared["N"] * slots.count,)](
        query,
        key,
        log_decay.contiguous(),
        beta.contiguous(),
        slots.table,
        vectors,
        inverse,
        scores,
        slots.S,
        slots.count,
        scale,
        *strides[:4],
        NORMALIZE=norm,
        EXACT=_exact(query.dtype),
        BLOCK_K=settings.block,
        num_warps=settings.num_warps,
        num_stages=settings.num_stages,
        **shared,
    )


def _walk(
    query, key, value, initial, slots, strides, kept, scale, shared,
    *, y=None, final=None, states=None, written=None,
):  # fmt: skip
    """Walk forwards for `y` and `final`, or for the `states` before chunks and what is `written`."""
    N, K, V = shared["N"], query.shape[-1], value.shape[-1]
    if slots.sequences == 0:
        return
    settings = delta_settings("forward", query.dtype, K, V, slots.sequences * N)
    forward_kernel[(ceil_div(V, settings.block) * N * slots.sequences,)](
        query,
        key,
        value,
        *kept,
        None if initial is None else initial.contiguous(),
        slots.cu_seqlens,
        slots.first,
        y,
        final,
        states,
        written,
        slots.S,
        slots.count,
        scale,
        *strides,
        V=V,
        VALUE_GROUP=N // value.shape[-2],
        OUTPUT=y is not None,
        KEEP=states is not None,
        HAS_INITIAL=initial is not None,
        BLOCK_K=block_of(K),
        BLOCK_V=settings.block,
        num_warps=settings.num_warps,
        num_stages=settings.num_stages,
        **shared,
    )


def _backward_fake(
    grad_y, grad_final, query, key, value, log_decay, beta, initial, cu, first, table, vectors,
    inverse, scores, norm, scale,
):  # fmt: skip
    given = (query, key, value, log_decay, beta, initial)
    return tuple(query.new_empty(0) if x is None else x.new_empty(x.shape) for x in given)


@define(
    "gated_delta_rule_backward(Tensor? grad_y, Tensor? grad_final, Tensor query, Tensor key, "
    "Tensor value, Tensor log_decay, Tensor beta, Tensor? initial, Tensor? cu_seqlens, "
    "Tensor? first, Tensor? table, Tensor vectors, Tensor inverse, Tensor scores, bool normalize, "
    "float scale) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward_fake,
)
def _backward(
    grad_y, grad_final, query, key, value, log_decay, beta, initial, cu, first, table, vectors,
    inverse, scores, norm, scale,
):  # fmt: skip
    N, K, V = log_decay.shape[-1], query.shape[-1], value.shape[-1]
    tokens, heads = query.shape[:-2], [each.shape[-2] for each in (query, key, value)]
    dtype = query.dtype
    slots = _slots(query, cu, first, table)
    (query, key, value), strides = _heads(query, key, value)
    shared = _shared(query, key, value, N, slots)
    grad_y = query.new_zeros((*tokens, N, V)) if grad_y is None else grad_y.contiguous()
    states, grad_states = (query.new_empty((slots.count, N, K, V)) for _ in range(2))
    # In two numbers, unless they are float32.
    parts = 1 if dtype == torch.float32 else 2
    written = query.new_empty((parts, slots.count, N, slots.chunk, V))
    grad_scaled = query.new_empty((slots.count, N, slots.chunk, V))
    # Heads that shared an input are summed afterwards, and rounded once.
    grads = [
        query.new_empty((*tokens, N, each), dtype=dtype if shares == N else torch.float32)
        for each, shares in zip((K, K, V), heads, strict=True)
    ]
    grad_decay, grad_beta = log_decay.new_empty(log_decay.shape), beta.new_empty(beta.shape)
    grad_initial = query.new_empty(0) if initial is None else initial.new_empty(initial.shape)
    kept = (vectors, inverse, scores)
    _walk(
        query, key, value, initial, slots, strides, kept, scale, shared,
        states=states, written=written,
    )  # fmt: skip
    if slots.sequences > 0:
        settings = delta_settings("backward", dtype, K, V, slots.sequences * N)
        backward_kernel[(ceil_div(V, settings.block) * N * slots.sequences,)](
            query,
            key,
            grad_y,
            *kept,
            None if grad_final is None else grad_final.contiguous(),
            slots.cu_seqlens,
            slots.first,
            grad_states,
            grad_scaled,
            grads[2],
            grad_initial,
            slots.S,
            scale,
            *strides[:4],
            V=V,
            HAS_GRAD_FINAL=grad_final is not None,
            HAS_INITIAL=initial is not None,
            BLOCK_K=block_of(K),
            BLOCK_V=settings.block,
            num_warps=settings.num_warps,
            num_stages=settings.num_stages,
            **shared,
        )
    if grad_y.numel() > 0:
        settings = delta_settings("inputs", dtype, K, V, slots.sequences * N)
        inputs_kernel[(N * slots.count,)](
            query,
            key,
            value,
            grad_y,
            slots.table,
            vectors,
            states,
            written,
            grad_states,
            grad_scaled,
            grads[0],
            grads[1],
            grad_decay,
            grad_beta,
            slots.S,
            slots.count,
            scale,
            *strides,
            V=V,
            VALUE_GROUP=N // value.shape[-2],
            NORMALIZE=norm,
            BLOCK_K=block_of(K),
            BLOCK_V=settings.block,
            num_warps=settings.num_warps,
            num_stages=settings.num_stages,
            **shared,
        )
    summed = [sum_groups(each, share, dtype) for each, share in zip(grads, heads, strict=True)]
    return *summed, grad_decay, grad_beta, grad_initial
