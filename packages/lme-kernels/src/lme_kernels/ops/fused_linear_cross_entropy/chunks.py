"""How many rows of logits a loss of a linear layer makes at a time.

The gradient of the weight is summed over chunks, so that every chunk reads and writes all of it;
the gradient of `x` is one matrix product a chunk, whose tiles fill the multiprocessors in waves of
which the last may be nearly empty. More rows are better for the first and any number may be best
for the second; memory sets the limit. In bf16 with V = 128256, in MiB:

| T, H | sums in | sums | dW | dx | rows, logits | peak, chunks | peak, end |
| --- | --- | --- | --- | --- | --- | --- | --- |
| 8192, 2048 | float32 | 1002 | 501 | 32 | 2048: 501 | 1535 | 1535 |
| 16384, 4096 | float32 | 2004 | 1002 | 128 | 4096: 1002 | 3134 | 3134 |
| 8192, 2048 | bf16 | 501 | (same) | 32 | 512: 125 | 658 | 533 |
| 16384, 4096 | bf16 | 1002 | (same) | 128 | 1024: 251 | 1381 | 1130 |

"Peak, chunks" is sums + dx + logits, which the gradient of the logits replaces in place; "peak,
end" is sums + dW + dx, where sums become the weight's gradient as they are multiplied by that of
the loss. `x`, `weight` and labels are not counted.
"""

from functools import cache

import torch
from torch import Tensor

# Tile of the usual matrix product on Hopper.
TILE_ROWS, TILE_COLUMNS = 128, 256
# Logits of a chunk may take this share of the bytes of the sums of the weight's gradient...
SHARE_WIDE, SHARE_NARROW = 0.69, 0.33
# ... but need not be less than this...
FLOOR_WIDE_BYTES, FLOOR_NARROW_BYTES = 256 << 20, 128 << 20
# ... and where they are more, more rows than these are of no use.
ENOUGH_ROWS = 4096
# Operations a second and bytes a second of a large accelerator; only their ratio matters.
OPERATIONS, BANDWIDTH = 7.0e14, 3.0e12

# A chunk that stays in the caches of a CPU, and rows that keep its matrix products efficient.
CPU_CHUNK_BYTES, CPU_ROWS = 8 << 20, 256


def chunks_of(x: Tensor, weight: Tensor, accumulate: torch.dtype) -> list[slice]:
    """Divide the rows of `x`.

    Args:
        x: Shape (T, H).
        weight: Shape (V, H).
        accumulate: Dtype of the sums of the weight's gradient.

    Returns:
        Slices of rows, in order; none if there are no rows.
    """
    T, V = x.shape[0], max(weight.shape[0], 1)
    if x.device.type == "cuda":
        rows = rows_of_chunk(
            T, V, x.shape[1], x.element_size(), accumulate.itemsize, _processors(x.device)
        )
    else:
        rows = max(CPU_ROWS, CPU_CHUNK_BYTES // (V * max(x.element_size(), 4)))
    return [slice(start, min(start + rows, T)) for start in range(0, T, rows)]


@cache
def rows_of_chunk(
    T: int, V: int, H: int, element_bytes: int, sum_bytes: int, processors: int
) -> int:
    """Rows of a chunk that make the whole fastest within the memory that the module allows.

    Args:
        T: Rows in all.
        V: Classes.
        H: Channels.
        element_bytes: Bytes of an element of the logits.
        sum_bytes: Bytes of an element of the sums of the weight's gradient.
        processors: Multiprocessors.

    Returns:
        A multiple of 128, or `T` if that is less.
    """
    wide = sum_bytes > element_bytes or element_bytes >= 4
    floor_bytes = FLOOR_WIDE_BYTES if wide else FLOOR_NARROW_BYTES
    share = SHARE_WIDE if wide else SHARE_NARROW
    row_bytes = V * element_bytes
    limit = max(
        floor_bytes // row_bytes, min(ENOUGH_ROWS, int(share * V * H * sum_bytes) // row_bytes)
    )
    if limit >= T:
        return max(T, 1)
    most = max(1, limit // TILE_ROWS)
    # The largest of equals: fewer chunks launch less.
    candidates = [TILE_ROWS * tiles for tiles in range(most, max(1, most // 3) - 1, -1)]
    return min(candidates, key=lambda rows: _seconds(T, V, H, sum_bytes, processors, rows))


def _seconds(T: int, V: int, H: int, sum_bytes: int, processors: int, rows: int) -> float:
    whole, rest = divmod(T, rows)
    total = 0.0
    for count, size in ((whole, rows), (1, rest)):
        if size == 0:
            continue
        product = 2.0 * size * V * H / OPERATIONS
        # A third of the traffic is assumed not to hide behind the products.
        traffic = 2.0 * V * H * sum_bytes / BANDWIDTH / 3.0
        total += count * (product / _filled(size, H, processors) + 2.0 * product + traffic)
    return total


def _filled(rows: int, H: int, processors: int) -> float:
    """Share of the multiprocessors at work in the product that makes the gradient of `x`."""
    tiles = -(-rows // TILE_ROWS) * -(-H // TILE_COLUMNS)
    shares = []
    # Few tiles are split along the classes.
    for split in range(1, 9 if tiles < processors else 2):
        programs = tiles * split
        shares.append(programs / (-(-programs // processors) * processors))
    return max(shares)


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
