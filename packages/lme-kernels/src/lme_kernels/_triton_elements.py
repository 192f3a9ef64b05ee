"""What Triton kernels over elements share: how tensors of one shape are walked together."""

import triton
import triton.language as tl

from lme_kernels.strides import as_matrices as as_matrices
from lme_kernels.tuning import ceil_div, next_power_of_two

# Elements a program takes: 16 bytes a thread and load in bfloat16, twice.
BLOCK = 2048
ELEMENTS_PER_WARP = 512


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
