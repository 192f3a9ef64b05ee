"""Tables on the device of where tensors are: one launch then serves any number of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor

# Elements that one program takes.
CHUNK = 65536
# Bytes that vector loads need addresses to be a multiple of.
ALIGNMENT = 16


@dataclass(frozen=True, slots=True)
class Table:
    """Where many tensors are."""

    values: Tensor
    """int64, shape (2 + rows, tensors): for each tensor the number of chunks up to its end, its
    elements, and one row for each list of addresses or numbers."""
    tensors: int
    chunks: int
    """Programs to launch."""
    is_aligned: bool
    """Whether every address is a multiple of 16 bytes."""


def make_table(
    sizes: Sequence[int],
    addresses: Sequence[Sequence[int]],
    device: torch.device,
    *,
    others: Sequence[Sequence[int]] = (),
    write: Callable[[Tensor, tuple[int, ...]], None],
) -> Table:
    """Make the table of some tensors.

    It is kept as long as tensors stay where they are, and nothing waits for the device. While a
    CUDA graph is captured, the table becomes part of the graph: kernels that carry the numbers as
    arguments write it, so that a replay reads no memory of the host.

    Args:
        sizes: Elements of each tensor.
        addresses: Lists of one address a tensor.
        device: Where the tensors are.
        others: Lists of one number a tensor that is no address of elements.
        write: Writes numbers to a tensor by launching kernels.

    Returns:
        The table.
    """
    ends = list(accumulate(-(-size // CHUNK) for size in sizes))
    is_aligned = all(each % ALIGNMENT == 0 for row in addresses for each in row)
    rows = (ends, sizes, *addresses, *others)
    numbers = tuple(number for row in rows for number in row)
    shape = (len(rows), len(sizes))
    if device.type != "cuda":
        values = torch.tensor(numbers, dtype=torch.int64, device=device).reshape(shape)
    elif torch.cuda.is_current_stream_capturing():
        values = torch.empty(shape, dtype=torch.int64, device=device)
        write(values, numbers)
    else:
        # A table that was copied on one stream may not be there yet for another.
        stream = torch.cuda.current_stream(device).cuda_stream
        values = _copied(numbers, shape, device, stream)
    return Table(values, len(sizes), ends[-1] if ends else 0, is_aligned)


@lru_cache(maxsize=64)
def _copied(
    numbers: tuple[int, ...], shape: tuple[int, int], device: torch.device, stream: int
) -> Tensor:
    del stream
    host = torch.tensor(numbers, dtype=torch.int64, pin_memory=True).reshape(shape)
    return host.to(device, non_blocking=True)
