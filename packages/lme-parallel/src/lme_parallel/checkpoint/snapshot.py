"""What a checkpoint of one moment holds, and the host buffer that an asynchronous save copies to."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lme_parallel.checkpoint.arrays import ArrayLayout, SavedTensor
from lme_parallel.checkpoint.crew import Crew
from lme_parallel.checkpoint.layout import check_array_name
from lme_parallel.checkpoint.optimizer_state import split_name, state_shard, tensor_state
from lme_parallel.checkpoint.sharing import LocalTensor, share_out
from lme_parallel.shards import Shard, whole

logger = logging.getLogger(__name__)

_ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything that goes into one checkpoint."""

    step: int
    """Optimizer steps done."""
    tensors: Sequence[SavedTensor]
    """What this process writes."""
    documents: Mapping[str, bytes]
    """Content of the JSON files at the top, by file name."""
    shared: Mapping[str, ArrayLayout] | None = None
    """All arrays, by folder, where several processes write; `None`: those of `tensors`."""

    @property
    def arrays(self) -> Mapping[str, ArrayLayout]:
        """Every array of the checkpoint, by folder."""
        if self.shared is not None:
            return self.shared
        return {each.path: each.layout for each in self.tensors}


def local_tensors(
    parameters: Mapping[str, nn.Parameter],
    buffers: Mapping[str, Tensor],
    optimizer: Optimizer | None,
    shards: Mapping[str, Shard] | None = None,
) -> list[LocalTensor]:
    """Name every tensor of a checkpoint and say which part is here; nothing is copied.

    Args:
        parameters: By fully qualified name.
        buffers: By fully qualified name.
        optimizer: Its state is taken too; `None` for none.
        shards: Parts of the parameters; `None`: they are whole.

    Raises:
        CheckpointError: If a name or a kind of state cannot be saved.
    """
    shards = {} if shards is None else shards
    found = []
    for name, tensor in {**parameters, **buffers}.items():
        shard = shards.get(name) or whole(tensor.shape)
        found.append(_local(f"model/{name}", tensor, shard))
    if optimizer is not None:
        names: dict[Tensor, str] = {parameter: name for name, parameter in parameters.items()}
        for name, tensor in tensor_state(optimizer, names).items():
            owner = split_name(name)[0]
            shard = state_shard(name, tensor, parameters[owner], shards.get(owner))
            found.append(_local(f"optimizer/{name}", tensor, shard))
    return found


def collect_tensors(
    parameters: Mapping[str, nn.Parameter],
    buffers: Mapping[str, Tensor],
    optimizer: Optimizer | None,
) -> list[SavedTensor]:
    """Lay out every tensor of a checkpoint that one process holds whole.

    Args:
        parameters: By fully qualified name.
        buffers: By fully qualified name.
        optimizer: Its state is taken too; `None` for none.

    Raises:
        CheckpointError: If a name, a dtype or a kind of state cannot be saved.
    """
    return share_out(local_tensors(parameters, buffers, optimizer), Crew())[0]


def _local(path: str, tensor: Tensor, shard: Shard) -> LocalTensor:
    check_array_name(path.partition("/")[2])
    return LocalTensor(path, shard, tensor.detach())


class HostBuffer:
    """One block of host memory, allocated once, that holds a copy of every tensor.

    Args:
        size: Bytes to allocate now.
        pinned: Whether devices copy into it directly.
    """

    def __init__(self, size: int, *, pinned: bool) -> None:
        self._pinned = pinned
        self._memory = self._allocate(size)

    @property
    def size(self) -> int:
        """Bytes allocated."""
        return self._memory.numel()

    def copy(self, tensors: Sequence[SavedTensor]) -> list[SavedTensor]:
        """Copy tensors into the buffer and return the copies, once they are complete.

        The buffer grows, once, if the tensors need more than was foreseen.

        Args:
            tensors: On any devices; they may change as soon as this returns.
        """
        needed = buffer_bytes([each.tensor for each in tensors])
        if needed > self.size:
            logger.info("checkpoint buffer grew: bytes=%d was=%d", needed, self.size)
            self._memory = self._allocate(needed)
        copies, offset, devices = [], 0, set()
        for each in tensors:
            size = each.tensor.numel() * each.tensor.element_size()
            place = self._memory[offset : offset + size].view(each.tensor.dtype)
            place = place.view(each.tensor.shape)
            place.copy_(each.tensor, non_blocking=True)
            copies.append(replace(each, tensor=place))
            offset += _aligned(size)
            devices.add(each.tensor.device)
        for device in devices:
            if device.type != "cpu":
                torch.accelerator.synchronize(device)
        return copies

    def _allocate(self, size: int) -> Tensor:
        # Touched now: the first save should not wait for the system to find the pages.
        return torch.zeros(size, dtype=torch.uint8, pin_memory=self._pinned)


def buffer_bytes(tensors: Sequence[Tensor]) -> int:
    """Return the bytes that a buffer needs for `tensors`."""
    return sum(_aligned(each.numel() * each.element_size()) for each in tensors)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
