"""What Triton kernels over rows share: strides, launch settings, sums of partial gradients."""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from lme_kernels._triton_launch import thin_launch
from lme_kernels.strides import as_rows as as_rows
from lme_kernels.strides import num_rows as num_rows
from lme_kernels.tuning import FIXED, RowSettings, ceil_div, row_settings

# Widest row that a program keeps in registers.
MAX_COLUMNS = 32768


def why_not_rows(x: Tensor) -> str | None:
    """Say why the kernels that keep a row in registers cannot take `x`."""
    if x.shape[-1] > MAX_COLUMNS:
        return f"rows have {x.shape[-1]} columns, and it takes at most {MAX_COLUMNS}"
    if x.shape[-1] == 0:
        return "rows have no columns"
    return None


@cache
def num_processors(device: torch.device) -> int:
    """Count the streaming multiprocessors of a device; a few under the interpreter."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 4


def settings_of(op: str, x: Tensor, rows: int) -> RowSettings:
    """Launch settings of `op` for `rows` rows like those of `x`."""
    fixed = FIXED.get()
    if fixed is not None and fixed[0] == op:
        return fixed[1]
    return row_settings(op, rows, x.shape[-1], x.element_size(), num_processors(x.device))


@thin_launch
@triton.jit(do_not_specialize=["count"])
def _sum_kernel(
    partial_ptr, sum_ptr, count, columns, BLOCK_COUNT: tl.constexpr, BLOCK: tl.constexpr
):
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK_COUNT, BLOCK), dtype=tl.float32)
    for start in range(0, count, BLOCK_COUNT):
        index = start + tl.arange(0, BLOCK_COUNT)
        mask = (index < count)[:, None] & (column < columns)[None, :]
        offset = index.to(tl.int64)[:, None] * columns + column[None, :]
        total += tl.load(partial_ptr + offset, mask=mask, other=0.0)
    tl.store(sum_ptr + column, tl.sum(total, axis=0), mask=column < columns)


def sum_partials(partials: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum the float32 partial gradients of the programs, shape (programs, columns), in a fixed order.

    Args:
        partials: One row a program.
        dtype: Dtype of the result.

    Returns:
        Shape (columns,).
    """
    count, columns = partials.shape
    total = torch.empty(columns, dtype=dtype, device=partials.device)
    BLOCK = 32
    _sum_kernel[(ceil_div(columns, BLOCK),)](
        partials, total, count, columns, BLOCK_COUNT=128, BLOCK=BLOCK, num_warps=8
    )
    return total
