"""Packed and padded tokens in CUDA C++: one kernel each way, each the other's backward."""

from functools import lru_cache

import torch
from torch import Tensor

from lme_kernels.cuda_driver import Kernel, kernel
from lme_kernels.custom_ops import define
from lme_kernels.strides import has_whole_rows
from lme_kernels.tuning import ceil_div

FILE = "ops/pack_sequence/_cuda.cu"
THREADS = 256
# Units that a warp copies of a row.
PART = 256
UNITS = {1: "unsigned char", 2: "unsigned short", 4: "unsigned", 8: "uint2", 16: "uint4"}
OFFSETS = {torch.int32: "int", torch.int64: "long long"}


def why_not(x: Tensor, cu_seqlens: Tensor) -> str | None:
    """Say why the kernels cannot copy `x`."""
    if x.is_complex():
        # One may be a view that says "conjugate": its bytes are not its values.
        return f"it does not copy {x.dtype}"
    if cu_seqlens.device != x.device:
        return f"`cu_seqlens` is on {cu_seqlens.device} and `x` on {x.device}"
    return None


def _unit(*bits: int) -> int:
    """Bytes of the largest unit, at most 16, that divides all numbers."""
    union = 16
    for each in bits:
        union |= each
    return union & -union


def _plan(
    name: str, parameters: str, unit: int, rows: int, width: int, cu_seqlens: Tensor
) -> tuple[Kernel, int, int]:
    """Kernel to launch for `rows` of `width` units, its blocks and the parts of a row."""
    parts = ceil_div(width, PART)
    # A warp takes a part of a row, or where rows are narrower than a warp a thread takes a unit.
    wide = width >= 32
    threads = rows * (parts * 32 if wide else width)
    launch = kernel(
        FILE,
        f"{name}_wide" if wide else f"{name}_narrow",
        parameters,
        (f"UNIT={UNITS[unit]}", f"OFFSET={OFFSETS[cu_seqlens.dtype]}"),
        cu_seqlens.get_device(),
    )
    return launch, ceil_div(threads, THREADS), parts


def _pack_fake(x: Tensor, cu_seqlens: Tensor, total_tokens: int, left: bool) -> Tensor:
    return x.new_empty((total_tokens, *x.shape[2:]))


@define(
    "pack_sequence_cuda_forward(Tensor x, Tensor cu_seqlens, SymInt total_tokens, bool left) -> "
    "Tensor",
    _pack_fake,
)
def pack(x: Tensor, cu_seqlens: Tensor, total_tokens: int, left: bool) -> Tensor:
    """Launch the kernel: shape (B, S, ...) to (total_tokens, ...)."""
    y = torch.empty((total_tokens, *x.shape[2:]), dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    if x.numel() == 0:
        return y.zero_()
    if not (x.is_contiguous() or has_whole_rows(x, 2)):
        x = x.contiguous()
    cu_seqlens = cu_seqlens.contiguous()
    size = x.element_size()
    B, S = x.shape[:2]
    pointers = x.data_ptr(), cu_seqlens.data_ptr(), y.data_ptr()
    strides = x.stride(0) * size, x.stride(1) * size, y.numel() // total_tokens * size
    unit = _unit(pointers[0], pointers[2], *strides)
    launch, grid, parts = _plan(
        "pack", "PPPqqqqqIii", unit, total_tokens, strides[2] // unit, cu_seqlens
    )
    units = (each // unit for each in strides)
    launch(grid, (THREADS, 1), *pointers, *units, total_tokens, S, parts, B, left)
    return y


def _unpack_fake(
    x: Tensor, cu_seqlens: Tensor, max_seqlen: int, left: bool, pad_value: float
) -> Tensor:
    return x.new_empty((cu_seqlens.shape[0] - 1, max_seqlen, *x.shape[1:]))


@define(
    "unpack_sequence_cuda_forward(Tensor x, Tensor cu_seqlens, SymInt max_seqlen, bool left, "
    "Scalar pad_value) -> Tensor",
    _unpack_fake,
)
def unpack(x: Tensor, cu_seqlens: Tensor, max_seqlen: int, left: bool, pad_value: float) -> Tensor:
    """Launch the kernel: shape (T, ...) to (B, max_seqlen, ...), pads included."""
    B = cu_seqlens.shape[0] - 1
    rows = B * max_seqlen
    y = torch.empty((B, max_seqlen, *x.shape[1:]), dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    if x.numel() == 0:
        return y.fill_(pad_value)
    if not (x.is_contiguous() or has_whole_rows(x, 1)):
        x = x.contiguous()
    cu_seqlens = cu_seqlens.contiguous()
    size = x.element_size()
    pointers = x.data_ptr(), cu_seqlens.data_ptr(), y.data_ptr()
    strides = x.stride(0) * size, y.numel() // rows * size
    unit = _unit(pointers[0], pointers[2], *strides)
    launch, grid, parts = _plan(
        "unpack", "PPPqqqqqQQIi", unit, rows, strides[1] // unit, cu_seqlens
    )
    units = (each // unit for each in strides)
    pad = pad_bits(repr(pad_value), x.dtype)
    launch(grid, (THREADS, 1), *pointers, *units, rows, x.shape[0], max_seqlen, *pad, parts, left)
    return y


@lru_cache(maxsize=256)
def pad_bits(pad_value: str, dtype: torch.dtype) -> tuple[int, int]:
    """Give the bits of a pad, repeated to 16 bytes.

    Args:
        pad_value: The value as `repr` writes it, which tells -0.0 from 0.0.
        dtype: Its dtype.

    Returns:
        The first eight bytes and the others, as integers.
    """
    value = int(pad_value) if pad_value.lstrip("-").isdigit() else float(pad_value)
    element = torch.full((1,), value, dtype=dtype, device="cpu").view(torch.uint8).tolist()
    repeated = bytes(element) * (16 // len(element))
    low, high = (int.from_bytes(repeated[start : start + 8], "little") for start in (0, 8))
    return low, high
