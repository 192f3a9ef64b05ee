"""Activations of experts in Triton, and where a tile's expert is."""

import triton
import triton.language as tl


@triton.jit
def gate(x, NAME: tl.constexpr):
    """Activation of a float32 number."""
    if NAME == "silu":
        y = x * tl.sigmoid(x)
    elif NAME == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif NAME == "gelu_tanh":
        y = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif NAME == "relu":
        y = tl.maximum(x, 0.0)
    elif NAME == "relu_squared":
        y = tl.maximum(x, 0.0) * x
    else:
        y = tl.sigmoid(x)
    return y


@triton.jit
def gate_slope(x, NAME: tl.constexpr):
    """Derivative of `gate`."""
    if NAME == "silu":
        s = tl.sigmoid(x)
        y = s * (1.0 + x * (1.0 - s))
    elif NAME == "gelu":
        density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
        y = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * density
    elif NAME == "gelu_tanh":
        s = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
        y = s + x * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    elif NAME == "relu":
        y = tl.where(x > 0.0, 1.0, 0.0)
    elif NAME == "relu_squared":
        y = 2.0 * tl.maximum(x, 0.0)
    else:
        s = tl.sigmoid(x)
        y = s * (1.0 - s)
    return y


@triton.jit
def locate(tile, offsets_ptr, num_experts, ROWS: tl.constexpr, BLOCK_EXPERTS: tl.constexpr):
    """Expert of a tile of sorted rows, its first row, and the end of the expert's rows.

    Tiles are numbered through the experts, each of which ends with a part of a tile; those past
    the last have an empty range.
    """
    each = tl.arange(0, BLOCK_EXPERTS)
    ends = tl.load(offsets_ptr + each, mask=each < num_experts, other=0)
    starts = tl.load(offsets_ptr + each - 1, mask=(each > 0) & (each < num_experts), other=0)
    counts = tl.where(each < num_experts, ends - starts, 0)
    tiles = (counts + ROWS - 1) // ROWS
    last = tl.cumsum(tiles, axis=0)
    expert = tl.sum(((last <= tile) & (each < num_experts)).to(tl.int32), axis=0)
    before = tl.sum(tl.where(each < expert, tiles, 0), axis=0)
    start = tl.sum(tl.where(each < expert, counts, 0), axis=0)
    end = start + tl.sum(tl.where(each == expert, counts, 0), axis=0)
    return tl.minimum(expert, num_experts - 1), start + (tile - before) * ROWS, end


@triton.jit
def tile_of_program(tiles_m, tiles_n, GROUP: tl.constexpr):
    """Row and column of this program's tile: few rows of tiles at a time, for the cache's sake."""
    program = tl.program_id(0)
    group = program // (GROUP * tiles_n)
    size = tl.minimum(tiles_m - group * GROUP, GROUP)
    within = program % (GROUP * tiles_n)
    return group * GROUP + within % size, within // size
