"""The norm of all gradients, and clipping by it."""

from collections.abc import Sequence

import torch
from torch import Tensor

# A running fp32 sum over millions of elements is off in the fourth digit on a CPU; over so many
# it is not, and fp64 throughout would be 25 times slower.
_SEGMENT = 4096


def global_norm(gradients: Sequence[Tensor], *, keep_wide: bool = False) -> Tensor:
    """Return the Euclidean norm of all elements of all gradients.

    Args:
        gradients: At least fp32, as low precision overflows when squared.
        keep_wide: Return it in the dtype of the last sum, fp64 where the device has it, for one
            that goes on.

    Returns:
        0-d, in the first gradient's dtype. Squares are summed in that dtype over short segments
        (CPU) or by the device's blocked kernels, and those sums in fp64 where the device has it.
    """
    parts = [norm for each in gradients if each.numel() for norm in _segment_norms(each)]
    if not parts:
        return torch.zeros((), dtype=torch.float64 if keep_wide else torch.float32)
    wide = torch.float32 if parts[0].device.type == "mps" else torch.float64
    norm = torch.linalg.vector_norm(torch.cat(parts), dtype=wide)
    return norm if keep_wide else norm.to(gradients[0].dtype)


def scale_gradients(gradients: Sequence[Tensor], factor: Tensor) -> None:
    """Multiply gradients in place, without waiting for the device they are on.

    Args:
        gradients: On one device.
        factor: 0-d. Where gradients are offloaded to the CPU and this is not, it is waited for.
    """
    if gradients:
        factor = factor.to(gradients[0].device)
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
