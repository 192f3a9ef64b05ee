"""The local side of a DTensor: its values, and where they belong in the whole."""

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from lme_parallel.shards import Shard, boxed, whole


def shard_of(tensor: Tensor) -> Shard:
    """Return which part of a tensor is here; a plain tensor is whole.

    The owner of a part is the process at place 0 of every mesh axis that copies it.
    """
    if not isinstance(tensor, DTensor):
        return whole(tensor.shape)
    mesh, placements = tensor.device_mesh, tensor.placements
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, mesh, placements)
    region = tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        raise RuntimeError("this process is not part of the mesh of its own parameter")
    # Everything that is no copy cuts, strided shards too.
    is_owner = all(
        place == 0
        for place, placement in zip(coordinate, placements, strict=True)
        if placement.is_replicate()
    )
    return boxed(tensor.shape, region, is_owner=is_owner)


def local_parameter(parameter: nn.Parameter) -> nn.Parameter:
    """Return a plain parameter over the local memory of a DTensor, for an optimizer."""
    if not isinstance(parameter, DTensor):
        return parameter
    local = local_of(parameter.detach())
    return nn.Parameter(local, requires_grad=parameter.requires_grad)


def local_of(tensor: Tensor) -> Tensor:
    """Return the local values of a DTensor; a plain tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def empty_local(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a DTensor cut like `tensor`, with memory on `device` and no values yet."""
    return torch.empty_like(tensor.detach(), device=device)
