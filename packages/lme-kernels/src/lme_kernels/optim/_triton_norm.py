"""Norm and scaling of a table of tensors in Triton: partial sums a chunk, then one sum of those."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from lme_kernels._triton_launch import thin_launch
from lme_kernels.device import why_not_triton
from lme_kernels.optim._triton_tables import TL_DTYPES, address, chunk_of_program, write_numbers
from lme_kernels.optim.tables import CHUNK, Table, make_table

BLOCK = 4096


def why_not(*tensors: Tensor) -> str | None:
    """Say why the kernels cannot take `tensors`."""
    return why_not_triton(*tensors)


@thin_launch
@triton.jit(do_not_specialize=["tensors", "at"])
def _squares_kernel(
    table_ptr,
    partial_ptr,
    tensors,
    at,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    SEARCH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tensor, start, count = chunk_of_program(table_ptr, tensors, CHUNK, SEARCH)
    x_ptr = address(table_ptr, tensors, 2, tensor, DTYPE, ALIGNED) + start
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    # Whole blocks without a mask, so that loads are as wide as they can be.
    whole = count // BLOCK * BLOCK
    for begin in range(0, whole, BLOCK):
        x = tl.load(x_ptr + begin + tl.arange(0, BLOCK)).to(tl.float32)
        total += x * x
    offset = whole + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offset, mask=offset < count, other=0.0).to(tl.float32)
    total += x * x
    tl.store(partial_ptr + at + tl.program_id(0), tl.sum(total, axis=0))


@thin_launch
@triton.jit(do_not_specialize=["count"])
def _root_kernel(partial_ptr, norm_ptr, count, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), dtype=tl.float64)
    for begin in range(0, count, BLOCK):
        offset = begin + tl.arange(0, BLOCK)
        total += tl.load(partial_ptr + offset, mask=offset < count, other=0.0).to(tl.float64)
    tl.store(norm_ptr, tl.sqrt(tl.sum(total, axis=0)).to(tl.float32))


@thin_launch
@triton.jit(do_not_specialize=["tensors"])
def _scale_kernel(
    table_ptr,
    norm_ptr,
    max_norm,
    tensors,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    SEARCH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    norm = tl.load(norm_ptr)
    factor = max_norm / (norm + 1e-6)
    # False for NaN. An infinite norm would make zeros of what is finite.
    if (factor < 1.0) & (norm < float("inf")):
        tensor, start, count = chunk_of_program(table_ptr, tensors, CHUNK, SEARCH)
        x_ptr = address(table_ptr, tensors, 2, tensor, DTYPE, ALIGNED) + start
        whole = count // BLOCK * BLOCK
        for begin in range(0, whole, BLOCK):
            offset = begin + tl.arange(0, BLOCK)
            x = tl.load(x_ptr + offset).to(tl.float32)
            tl.store(x_ptr + offset, (x * factor).to(DTYPE))
        offset = whole + tl.arange(0, BLOCK)
        mask = offset < count
        x = tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        tl.store(x_ptr + offset, (x * factor).to(DTYPE), mask=mask)


def grad_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Root of the sum of all squares, in two launches and one more a dtype."""
    device = tensors[0].device
    # Kept until the launches are made: some are copies.
    groups = _groups([each.contiguous() for each in tensors])
    tables = [_table(each, device) for each in groups]
    partials = torch.empty(
        sum(table.chunks for table in tables), dtype=torch.float32, device=device
    )
    at = 0
    for group, table in zip(groups, tables, strict=True):
        if table.chunks > 0:
            _squares_kernel[(table.chunks,)](
                table.values, partials, table.tensors, at, **_constants(group, table)
            )
        at += table.chunks
    norm = torch.empty((), dtype=torch.float32, device=device)
    _root_kernel[(1,)](partials, norm, at, BLOCK=1024, num_warps=8)
    return norm


def scale_by_norm(tensors: Sequence[Tensor], norm: Tensor, max_norm: float) -> None:
    """Multiply contiguous tensors in place so that their norm is at most `max_norm`."""
    for group in _groups(tensors):
        table = _table(group, tensors[0].device)
        if table.chunks > 0:
            _scale_kernel[(table.chunks,)](
                table.values, norm, max_norm, table.tensors, **_constants(group, table)
            )


def _groups(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    groups: dict[torch.dtype, list[Tensor]] = {}
    for each in tensors:
        groups.setdefault(each.dtype, []).append(each)
    return list(groups.values())


def _table(tensors: Sequence[Tensor], device: torch.device) -> Table:
    return make_table(
        [each.numel() for each in tensors],
        [[each.data_ptr() for each in tensors]],
        device,
        write=write_numbers,
    )


def _constants(tensors: Sequence[Tensor], table: Table) -> dict[str, object]:
    return {
        "DTYPE": TL_DTYPES[tensors[0].dtype],
        "ALIGNED": table.is_aligned,
        "CHUNK": CHUNK,
        "SEARCH": 256,
        "BLOCK": BLOCK,
        "num_warps": 8,
    }
