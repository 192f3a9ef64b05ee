"""What Triton kernels over elements share: how tensors of one shape are walked together."""

import triton
import triton.language as tl
from torch import Tensor

from lme_kernels._triton_rows import as_rows, num_rows
from lme_kernels.tuning import ceil_div, next_power_of_two

# Elements a program takes: 16 bytes a thread and load in bfloat16, twice.
BLOCK = 2048
ELEMENTS_PER_WARP = 512


def as_matrices(*tensors: Tensor) -> tuple[list[Tensor], list[int], int, int]:
    """Walk tensors of one shape together, as one long row where their layout allows it.

    Args:
        tensors: Tensors of the same shape, not empty.

    Returns:
        The tensors or copies of them, their row strides, the number of rows and of columns.
    """
    first = tensors[0]
    if all(each.is_contiguous() for each in tensors):
        return list(tensors), [0] * len(tensors), 1, first.numel()
    pairs = [as_rows(each) for each in tensors]
    rows = num_rows(first)
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs], rows, first.shape[-1]


def launch_shape(rows: int, columns: int) -> tuple[tuple[int], int, int, int]:
    """Divide rows and columns among programs.

    Args:
        rows: Number of rows.
        columns: Number of columns.

    Returns:
        The grid, the blocks a row, the elements of a block, and the warps of a program.
    """
    block = min(BLOCK, max(16, next_power_of_two(columns)))
    blocks = ceil_div(columns, block)
    return (rows * blocks,), blocks, block, max(1, block // ELEMENTS_PER_WARP)


@triton.jit
def block_of_program(blocks, BLOCK: tl.constexpr):
    """Row of this program, and the first column of its block, in 64 bits."""
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64)
    return row, (program % blocks).to(tl.int64) * BLOCK
