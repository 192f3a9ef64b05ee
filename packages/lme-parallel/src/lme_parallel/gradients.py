"""The norm of all gradients, and clipping by it."""

from collections.abc import Sequence

import torch
from torch import Tensor

# A running fp32 sum over millions of elements is off in the fourth digit on a CPU; over so many
# it is not, and fp64 throughout would be 25 times slower.
_SEGMENT = 4096


def global_norm(gradients: Sequence[Tensor]) -> Tensor:
    """Return the Euclidean norm of all elements of all gradients.

    Args:
        gradients: At least fp32, as low precision overflows when squared.

    Returns:
        0-d, in the first gradient's dtype. Squares are summed in that dtype over short segments
        (CPU) or by the device's blocked kernels, and those sums in fp64 where the device has it.
    """
    if not gradients:
        return torch.zeros(())
    parts = [norm for each in gradients for norm in _segment_norms(each)]
    wide = torch.float32 if parts[0].device.type == "mps" else torch.float64
    return torch.linalg.vector_norm(torch.cat(parts), dtype=wide).to(gradients[0].dtype)


def scale_gradients(gradients: Sequence[Tensor], factor: Tensor) -> None:
    """Multiply gradients in place, without waiting for the device.

    Args:
        gradients: On one device.
        factor: 0-d.
    """
    if gradients:
        # Foreach ops have no public names.
        torch._foreach_mul_(list(gradients), factor)  # pyright: ignore[reportPrivateImportUsage]


def _segment_norms(gradient: Tensor) -> list[Tensor]:
    if gradient.device.type != "cpu" or gradient.numel() <= _SEGMENT:
        return [torch.linalg.vector_norm(gradient).reshape(1)]
    flat = gradient.flatten()
    rest = flat.numel() % _SEGMENT
    body = flat[: flat.numel() - rest].view(-1, _SEGMENT)
    norms = [torch.linalg.vector_norm(body, dim=1)]
    if rest:
        norms.append(torch.linalg.vector_norm(flat[-rest:]).reshape(1))
    return norms
