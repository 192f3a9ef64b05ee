"""What CUDA C++ kernels over elements share: dtypes, and how rows are divided among threads."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lme_kernels.cuda_driver import kernel
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


@dataclass(frozen=True, slots=True)
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
        misaligned = 0
        for pointer, alignment in zip(pointers, self.alignments, strict=True):
            misaligned |= pointer % alignment
        for stride in strides:
            misaligned |= stride * size % max(self.alignments)
        if misaligned:
            variant, count, steps = "elements", 1, 8
        else:
            variant, count, steps = "vectors", min(self.alignments) // size, self.steps
        vectors = ceil_div(columns, count)
        width = min(THREADS, next_power_of_two(ceil_div(vectors, steps)))
        height = min(THREADS // width, next_power_of_two(rows))
        blocks = ceil_div(vectors, width * steps)
        launch = kernel(
            self.file,
            f"{self.name}_{variant}",
            "P" * len(pointers) + "q" * (len(strides) + 2) + "I",
            (f"ELEMENT={ELEMENTS[first.dtype]}",),
            first.get_device(),
        )
        grid = ceil_div(rows, height) * blocks
        launch(grid, (width, height), *pointers, *strides, rows, columns, blocks)
