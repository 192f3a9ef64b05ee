"""`torch.compile`, block by block and in place, so that names of parameters stay."""

from collections.abc import Iterable

from torch import nn


def apply_compile(blocks: Iterable[nn.Module], *, backend: str = "inductor") -> None:
    """Compile each block's call; equal blocks share one compilation.

    Args:
        blocks: Modules; compiled in place at their first call.
        backend: Name of a torch.compile backend.
    """
    for block in blocks:
        block.compile(backend=backend)
