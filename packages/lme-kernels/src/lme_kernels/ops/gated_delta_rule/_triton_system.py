"""What the gated delta rule solves in each chunk, in Triton: scores, decays, and an inverse.

A chunk writes `N = (I + A)^-1 diag(beta) X`, in which `A` is strictly lower triangular. The inverse
is that of blocks on the diagonal, doubled until one is left: blocks of one token need nothing, and
the block below two inverses `P` and `Q` is `-Q C P`. This is forward substitution by blocks, which
stays exact where a series in powers of `A` would cancel.
"""

import triton
import triton.language as tl

from lme_kernels._triton_chunks import load_rows, slot_of
from lme_kernels._triton_launch import thin_launch

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
NORM_EPS: tl.constexpr = tl.constexpr(1e-6)
# Vectors of float32 kept for each chunk and head: sums of log2 decays, what keys and queries are
# multiplied with to have norm 1, strengths.
VECTORS = 4


@triton.jit
def vectors_of(vectors_ptr, index, C: tl.constexpr):
    """Load what `prepare_kernel` keeps for chunk and head `index`, and the decay over the chunk."""
    ptr = vectors_ptr + index * (4 * C)
    row = tl.arange(0, C)
    until = tl.load(ptr + row)
    key_norm = tl.load(ptr + C + row)
    query_norm = tl.load(ptr + 2 * C + row)
    strength = tl.load(ptr + 3 * C + row)
    return until, key_norm, query_norm, strength, tl.load(ptr + C - 1)


@triton.jit
def power_of_two(x, PRECISION: tl.constexpr):
    """2 to the power of `x`; as exact as products are in float32, where a GPU's own is not."""
    if PRECISION == "ieee":
        # The device's instruction errs by up to 2^-22, four times what rounding does.
        x = tl.where(x < -130.0, -130.0, tl.where(x > 129.0, 129.0, x))
        whole = tl.floor(x + 0.5)
        part = x - whole
        # Taylor's series of exp(part log 2) for at most half a power, whose next term is 5e-9.
        y = part * 1.5252733804059841e-05 + 1.5403530393381608e-04
        y = part * y + 1.3333558146428443e-03
        y = part * y + 9.6181291076284772e-03
        y = part * y + 5.5504108664821580e-02
        y = part * y + 2.4022650695910072e-01
        y = part * y + 6.9314718055994531e-01
        y = part * y + 1.0
        # The exponent's bits: 0 below what float32 has in full digits, infinity above.
        exponent = tl.minimum(tl.maximum(whole, -127.0), 128.0).to(tl.int32) + 127
        result = y * (exponent << 23).to(tl.float32, bitcast=True)
    else:
        result = tl.exp2(x)
    return result


@triton.jit
def decays_between(until, STRICT: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr):
    """What is left at each token (down) of what an earlier one (across) wrote, else 0."""
    row = tl.arange(0, C)
    seen = row[:, None] > row[None, :] if STRICT else row[:, None] >= row[None, :]
    # Where it would be positive, and might overflow, nothing is seen.
    between = tl.where(seen, until[:, None] - until[None, :], 0.0)
    return tl.where(seen, power_of_two(between, PRECISION), 0.0)


@triton.jit
def _blocks(system, B: tl.constexpr, M: tl.constexpr):
    """Take the blocks (2 B, M, M) on the diagonal of matrices (B, 2 M, 2 M)."""
    parts = tl.reshape(system, (B, 2, M, 2, M))
    half = tl.arange(0, 2)
    same = half[None, :, None, None, None] == half[None, None, None, :, None]
    return tl.reshape(tl.sum(tl.where(same, parts, 0.0), axis=3), (2 * B, M, M))


@triton.jit
def _product(left, right, B: tl.constexpr, M: tl.constexpr, PRECISION: tl.constexpr):
    if B == 1:
        flat = tl.dot(
            tl.reshape(left, (M, M)), tl.reshape(right, (M, M)), input_precision=PRECISION
        )
        result = tl.reshape(flat, (1, M, M))
    else:
        result = tl.dot(left, right, input_precision=PRECISION)
    return result


@triton.jit
def _merge(system, inverse, B: tl.constexpr, M: tl.constexpr, PRECISION: tl.constexpr):
    """Make inverses (B, 2 M, 2 M) of those (2 B, M, M) of the blocks on the diagonal."""
    pairs = tl.reshape(inverse, (B, 2, M, M))
    half = tl.arange(0, 2)
    second = half[None, :, None, None] == 1
    upper = tl.sum(tl.where(second, 0.0, pairs), axis=1)
    lower = tl.sum(tl.where(second, pairs, 0.0), axis=1)
    parts = tl.reshape(system, (B, 2, M, 2, M))
    down, across = half[None, :, None, None, None], half[None, None, None, :, None]
    below = (down == 1) & (across == 0)
    corner = tl.sum(tl.sum(tl.where(below, parts, 0.0), axis=3), axis=1)
    corner = _product(_product(lower, corner, B, M, PRECISION), upper, B, M, PRECISION)
    kept = tl.where(down == across, pairs[:, :, :, None, :], 0.0)
    merged = tl.where(below, -corner[:, None, :, None, :], kept)
    return tl.reshape(merged, (B, 2 * M, 2 * M))


@triton.jit
def _small_inverse(system, PRECISION: tl.constexpr):
    """Invert `I + system` for matrices (B, 16, 16), strictly lower triangular."""
    row, column = tl.arange(0, 16)[:, None], tl.arange(0, 16)[None, :]
    identity = (row == column).to(tl.float32)[None, :, :]
    pair = (row == column + 1) & (row % 2 == 1)
    inverse = identity - tl.where(pair[None, :, :], system, 0.0)
    for level in tl.static_range(1, 4):
        block, beside = row >> level, (column >> level) + 1
        below = (block == beside) & (block % 2 == 1)
        corner = tl.where(below[None, :, :], system, 0.0)
        product = tl.dot(inverse, corner, input_precision=PRECISION)
        inverse -= tl.dot(product, inverse, input_precision=PRECISION)
    return inverse


@triton.jit
def unit_inverse(system, C: tl.constexpr, PRECISION: tl.constexpr):
    """Invert `I + system`, strictly lower triangular, shape (C, C) with C 32 or 64, float32."""
    half: tl.constexpr = C // 2
    whole = tl.reshape(system, (1, C, C))
    halves = _blocks(whole, 1, half)
    if C == 64:
        inverse = _small_inverse(_blocks(halves, 2, 16), PRECISION)
        inverse = _merge(halves, inverse, 2, 16, PRECISION)
    else:
        inverse = _small_inverse(halves, PRECISION)
    return tl.reshape(_merge(whole, inverse, 1, half, PRECISION), (C, C))


@thin_launch
@triton.jit(do_not_specialize=["S", "count"])
def prepare_kernel(
    query_ptr,
    key_ptr,
    decay_ptr,
    beta_ptr,
    table_ptr,
    vectors_ptr,
    inverse_ptr,
    scores_ptr,
    S,
    count,
    scale,
    query_stride,
    query_head_stride,
    key_stride,
    key_head_stride,
    N: tl.constexpr,
    K: tl.constexpr,
    QUERY_GROUP: tl.constexpr,
    KEY_GROUP: tl.constexpr,
    NORMALIZE: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
    EXACT: tl.constexpr,
    C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    head, slot = tl.program_id(0) % N, (tl.program_id(0) // N).to(tl.int64)
    start, length = slot_of(table_ptr, slot, count, S, C, PACKED)
    if length <= 0:
        return
    row = tl.arange(0, C)
    live = row < length
    own = (start + row) * N + head
    decay = tl.load(decay_ptr + own, mask=live, other=0.0).to(tl.float32)
    strength = tl.load(beta_ptr + own, mask=live, other=0.0).to(tl.float32)
    until = tl.cumsum(decay * LOG2_E, 0)
    query_ptr += (head // QUERY_GROUP).to(tl.int64) * query_head_stride
    key_ptr += (head // KEY_GROUP).to(tl.int64) * key_head_stride
    gram = tl.zeros((C, C), dtype=tl.float32)
    scores = tl.zeros((C, C), dtype=tl.float32)
    query_norm = tl.zeros((C,), dtype=tl.float32)
    key_norm = tl.zeros((C,), dtype=tl.float32)
    # Not loaded ahead: of a tile that a product and the norms read the compiler keeps one buffer, and
    # would load the next block into it while the tensor cores still read this one.
    for first in tl.range(0, K, BLOCK_K, num_stages=1):
        key = load_rows(key_ptr, start, length, key_stride, first, C, K, BLOCK_K)
        query = load_rows(query_ptr, start, length, query_stride, first, C, K, BLOCK_K)
        gram = tl.dot(key, tl.trans(key), gram, input_precision=PRECISION)
        scores = tl.dot(query, tl.trans(key), scores, input_precision=PRECISION)
        if NORMALIZE:
            key_norm += tl.sum(key.to(tl.float32) * key.to(tl.float32), axis=1)
            query_norm += tl.sum(query.to(tl.float32) * query.to(tl.float32), axis=1)
    if NORMALIZE:
        key_norm = tl.rsqrt(key_norm + NORM_EPS)
        query_norm = tl.rsqrt(query_norm + NORM_EPS)
    else:
        key_norm += 1.0
        query_norm += 1.0
    index = slot * N + head
    vectors_ptr += index * (4 * C)
    tl.store(vectors_ptr + row, until)
    tl.store(vectors_ptr + C + row, key_norm)
    tl.store(vectors_ptr + 2 * C + row, query_norm)
    tl.store(vectors_ptr + 3 * C + row, strength)
    between = decays_between(until, False, C, PRECISION) * key_norm[None, :]
    tile = index * (C * C) + row[:, None] * C + row[None, :]
    tl.store(scores_ptr + tile, scores * between * (query_norm * scale)[:, None])
    system = gram * between * (strength * key_norm)[:, None]
    system = tl.where(row[:, None] > row[None, :], system, 0.0)
    tl.store(inverse_ptr + tile, unit_inverse(system, C, EXACT))
