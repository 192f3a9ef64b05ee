"""The global gradient norm, accumulated precisely."""

from collections.abc import Sequence

import torch
from torch import Tensor

# A running fp32 sum over ten million elements is wrong in the fourth digit on a CPU; over a row
# of this length it is right to the last.
_ROW = 4096


def global_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Return the Euclidean norm of all elements of all tensors.

    Args:
        tensors: On one device, of any floating point dtype; none at all gives 0.

    Returns:
        0-d, fp32, or fp64 if any tensor is. Squares are summed in fp32 (fp64 for fp64) over rows
        of 4096 elements on a CPU, and in blocks by the foreach kernels elsewhere; the partial
        sums are added in fp64 where the device has it.
    """
    if not tensors:
        return torch.zeros(())
    device = tensors[0].device
    wide = torch.float32 if device.type == "mps" else torch.float64
    result = torch.float32
    for tensor in tensors:
        result = torch.promote_types(result, tensor.dtype)
    if device.type == "cpu":
        partial = [norm for tensor in tensors for norm in _row_norms(tensor)]
    else:
        # Foreach ops have no public names.
        partial = [norm.reshape(1) for norm in torch._foreach_norm(list(tensors))]  # pyright: ignore[reportPrivateImportUsage]
    return torch.linalg.vector_norm(torch.cat(partial), dtype=wide).to(result)


def _row_norms(tensor: Tensor) -> list[Tensor]:
    flat = tensor.reshape(-1)
    flat = flat.to(torch.promote_types(flat.dtype, torch.float32))
    whole = flat.numel() // _ROW * _ROW
    return [
        torch.linalg.vector_norm(part.view(-1, width), dim=1)
        for part, width in ((flat[:whole], _ROW), (flat[whole:], flat.numel() - whole))
        if part.numel()
    ]


def clip(gradients: Sequence[Tensor], coefficient: Tensor) -> None:
    """Scale gradients in place.

    Args:
        gradients: On one device.
        coefficient: 0-d, on the same device.
    """
    if gradients:
        # Foreach ops have no public names.
        torch._foreach_mul_(list(gradients), coefficient)  # pyright: ignore[reportPrivateImportUsage]
