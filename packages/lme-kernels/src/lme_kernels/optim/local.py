"""The part of a tensor that is in this process."""

import sys

from torch import Tensor


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a distributed tensor, and any other tensor itself.

    Args:
        tensor: A plain tensor or a `DTensor`.

    Returns:
        A plain tensor, of the same memory.
    """
    # Whoever has such a tensor has loaded the module; nobody else pays for it.
    module = sys.modules.get("torch.distributed.tensor")
    if module is not None and isinstance(tensor, module.DTensor):
        # The module is not imported here, so that a checker cannot know the class.
        return tensor.to_local()  # pyright: ignore[reportAttributeAccessIssue]
    return tensor
