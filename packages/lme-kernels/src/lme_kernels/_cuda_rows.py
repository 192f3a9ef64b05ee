"""What CUDA C++ kernels over elements share: dtypes, and how rows are divided among threads."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from lme_kernels.cuda_driver import Kernel, kernel
from lme_kernels.tuning import ceil_div, next_power_of_two

# What `cuda_elements.cuh` calls the dtypes.
ELEMENTS: Mapping[torch.dtype, str] = {
    torch.float64: "double",
    torch.float32: "float",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
}
THREADS = 256


def why_not(*tensors: Tensor) -> str | None:
    """Say why the kernels cannot take `tensors`; `None` if they can."""
    for tensor in tensors:
        if tensor.dtype not in ELEMENTS:
            return f"{tensor.dtype} is not among float64, float32, float16 and bfloat16"
        if tensor.device != tensors[0].device:
            return f"its tensors are on {tensors[0].device} and on {tensor.device}"
    return None


@dataclass(frozen=True, slots=True, eq=False)
class RowKernel:
    """A kernel over rows, in two variants: `<name>_vectors` and `<name>_elements`."""

    file: str
    """Path of its source below the package."""
    name: str
    """Name of the kernel without the variant."""
    alignments: tuple[int, ...]
    """Bytes of a vector of each tensor, which must divide addresses and strides of `_vectors`."""
    steps: int
    """Vectors a thread of `_vectors`; one of `_elements` takes 8 elements."""

    def launch(
        self, tensors: Sequence[Tensor], strides: Sequence[int], rows: int, columns: int
    ) -> None:
        """Launch the variant that addresses and strides allow.

        Args:
            tensors: The pointers of the kernel: inputs, then results.
            strides: Elements from row to row of each tensor that the kernel takes one of.
            rows: Number of rows, at least 1.
            columns: Columns of the narrowest tensor, at least 1.
        """
        first = tensors[0]
        size = first.element_size()
        pointers = [each.data_ptr() for each in tensors]
        widest = max(self.alignments)
        bits = 0
        for pointer, alignment in zip(pointers, self.alignments, strict=True):
            bits |= pointer * (widest // alignment)
        for stride in strides:
            bits |= stride * size
        launch, grid, block, blocks = _plan(
            self, first.dtype, bits % widest == 0, len(strides), rows, columns, first.get_device()
        )
        launch(grid, block, *pointers, *strides, rows, columns, blocks)


@lru_cache(maxsize=4096)
def _plan(
    kernels: RowKernel,
    dtype: torch.dtype,
    aligned: bool,
    num_strides: int,
    rows: int,
    columns: int,
    device: int,
) -> tuple[Kernel, int, tuple[int, int], int]:
    """Kernel to launch, its blocks, the threads of a block, and the blocks of a row."""
    if aligned:
        variant, count, steps = "vectors", min(kernels.alignments) // dtype.itemsize, kernels.steps
    else:
        variant, count, steps = "elements", 1, 8
    vectors = ceil_div(columns, count)
    width = min(THREADS, next_power_of_two(ceil_div(vectors, steps)))
    height = min(THREADS // width, next_power_of_two(rows))
    blocks = ceil_div(vectors, width * steps)
    launch = kernel(
        kernels.file,
        f"{kernels.name}_{variant}",
        "P" * len(kernels.alignments) + "q" * (num_strides + 2) + "I",
        (f"ELEMENT={ELEMENTS[dtype]}",),
        device,
    )
    return launch, ceil_div(rows, height) * blocks, (width, height), blocks
