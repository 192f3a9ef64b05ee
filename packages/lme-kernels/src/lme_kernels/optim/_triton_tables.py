"""What kernels over tables of tensors share: finding a program's tensor, and writing a table."""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Numbers that one launch carries.
CARRIED = 32
BIAS = 2**62

TL_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@triton.jit
def chunk_of_program(table_ptr, tensors, CHUNK: tl.constexpr, SEARCH: tl.constexpr):
    """Tensor of this program, and the first element and the number of elements that it takes."""
    program = tl.program_id(0)
    tensor = 0
    for base in range(0, tensors, SEARCH):
        index = base + tl.arange(0, SEARCH)
        ends = tl.load(table_ptr + index, mask=index < tensors, other=0x7FFFFFFF)
        tensor += tl.sum((ends <= program).to(tl.int32), axis=0)
    before = tl.load(table_ptr + tensor - 1, mask=tensor > 0, other=0)
    start = (program - before).to(tl.int64) * CHUNK
    size = tl.load(table_ptr + tensors + tensor)
    return tensor, start, tl.minimum(size - start, CHUNK)


@triton.jit
def address(table_ptr, tensors, row, tensor, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Pointer in a row of the table."""
    number = tl.load(table_ptr + row * tensors + tensor)
    pointer = number.to(tl.pointer_type(DTYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit(do_not_specialize=["at", "count", *(f"n{index}" for index in range(CARRIED))])
def _write_kernel(
    table_ptr, at, count, BIAS: tl.constexpr, CARRIED: tl.constexpr,
    n0, n1, n2, n3, n4, n5, n6, n7, n8, n9, n10, n11, n12, n13, n14, n15,
    n16, n17, n18, n19, n20, n21, n22, n23, n24, n25, n26, n27, n28, n29, n30, n31,
):  # fmt: skip
    index = tl.arange(0, CARRIED)
    value = tl.zeros((CARRIED,), dtype=tl.int64)
    value = tl.where(index == 0, n0, value)
    value = tl.where(index == 1, n1, value)
    value = tl.where(index == 2, n2, value)
    value = tl.where(index == 3, n3, value)
    value = tl.where(index == 4, n4, value)
    value = tl.where(index == 5, n5, value)
    value = tl.where(index == 6, n6, value)
    value = tl.where(index == 7, n7, value)
    value = tl.where(index == 8, n8, value)
    value = tl.where(index == 9, n9, value)
    value = tl.where(index == 10, n10, value)
    value = tl.where(index == 11, n11, value)
    value = tl.where(index == 12, n12, value)
    value = tl.where(index == 13, n13, value)
    value = tl.where(index == 14, n14, value)
    value = tl.where(index == 15, n15, value)
    value = tl.where(index == 16, n16, value)
    value = tl.where(index == 17, n17, value)
    value = tl.where(index == 18, n18, value)
    value = tl.where(index == 19, n19, value)
    value = tl.where(index == 20, n20, value)
    value = tl.where(index == 21, n21, value)
    value = tl.where(index == 22, n22, value)
    value = tl.where(index == 23, n23, value)
    value = tl.where(index == 24, n24, value)
    value = tl.where(index == 25, n25, value)
    value = tl.where(index == 26, n26, value)
    value = tl.where(index == 27, n27, value)
    value = tl.where(index == 28, n28, value)
    value = tl.where(index == 29, n29, value)
    value = tl.where(index == 30, n30, value)
    value = tl.where(index == 31, n31, value)
    tl.store(table_ptr + at + index, value - BIAS, mask=index < count)


def write_numbers(target: Tensor, numbers: tuple[int, ...]) -> None:
    """Fill `target` with numbers that launches carry: a replay of a graph writes the same.

    Args:
        target: int64, contiguous, as many elements as `numbers`.
        numbers: What to write, from 0 to 2^62.
    """
    for at in range(0, len(numbers), CARRIED):
        part = numbers[at : at + CARRIED]
        # All above 2^32, so that every launch has the same types of arguments.
        carried = [each + BIAS for each in part] + [BIAS] * (CARRIED - len(part))
        _write_kernel[(1,)](target, at, len(part), BIAS, CARRIED, *carried, num_warps=1)
